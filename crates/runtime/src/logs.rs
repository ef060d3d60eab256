//! Output of pods and agents: pumped from a pipe into a file of bounded size, read back, followed.
//!
//! A log is two files, `NAME` and `NAME.1`. When the first reaches [`MAX_FILE_BYTES`] it takes the second's
//! place. Readers hold the files open, so that a rotation takes nothing from them that they have begun to read.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    sync::{mpsc, watch},
};

use crate::error::{During, Error};

/// Size at which a file is rotated, in bytes.
pub const MAX_FILE_BYTES: u64 = 8 << 20;
/// Bytes moved at a time.
const CHUNK_BYTES: usize = 64 * 1024;
/// Chunks that a reader may be behind before reading pauses.
const READER_QUEUE: usize = 4;

/// One log. Clones write to the same.
#[derive(Debug, Clone)]
pub struct Log {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    max_bytes: u64,
    file: Mutex<Current>,
    /// Counts writes and rotations: what readers wait for.
    changed: watch::Sender<u64>,
}

#[derive(Debug)]
struct Current {
    file: File,
    length: u64,
    /// How often was rotated.
    generation: u64,
}

impl Log {
    /// Opens the log, or makes it and the folder above it.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, Error> {
        Self::bounded(path.into(), MAX_FILE_BYTES)
    }

    fn bounded(path: PathBuf, max_bytes: u64) -> Result<Self, Error> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).during(|| format!("create {}", folder.display()))?;
        }
        let file = append(&path).during(|| format!("open {}", path.display()))?;
        let length = file
            .metadata()
            .during(|| format!("stat {}", path.display()))?
            .len();
        Ok(Self {
            inner: Arc::new(Inner {
                path,
                max_bytes,
                file: Mutex::new(Current {
                    file,
                    length,
                    generation: 0,
                }),
                changed: watch::Sender::new(0),
            }),
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// A pipe whose content goes to this log until its last writer is gone. Needs a tokio runtime.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn pipe(&self) -> Result<OwnedFd, Error> {
        let (reader, writer) = io::pipe().during(|| "create a pipe".into())?;
        let mut reader =
            pipe::Receiver::from_owned_fd(reader.into()).during(|| "watch a pipe".into())?;
        let log = self.clone();
        tokio::spawn(async move {
            let mut chunk = vec![0; CHUNK_BYTES];
            while let Ok(read @ 1..) = reader.read(&mut chunk).await {
                log.write(&chunk[..read]);
            }
        });
        Ok(writer.into())
    }

    /// Appends. A full disk loses output, never stops the program that writes it.
    pub fn write(&self, bytes: &[u8]) {
        let mut current = self.lock();
        if current.length >= self.inner.max_bytes
            && let Err(error) = self.rotate(&mut current)
        {
            tracing::warn!(path = %self.inner.path.display(), %error, "log cannot be rotated");
        }
        match current.file.write_all(bytes) {
            Ok(()) => current.length += bytes.len() as u64,
            Err(error) => tracing::warn!(path = %self.inner.path.display(), %error, "output lost"),
        }
        drop(current);
        self.inner.changed.send_modify(|count| *count += 1);
    }

    /// Reads the log from its beginning; with `follow`, goes on with what is written from now on, until the
    /// receiver is dropped or the log is no longer in use. Needs a tokio runtime.
    #[must_use]
    pub fn read(&self, follow: bool) -> mpsc::Receiver<Vec<u8>> {
        let (sender, receiver) = mpsc::channel(READER_QUEUE);
        let mut reader = Reader::open(self);
        let mut changed = self.inner.changed.subscribe();
        // A reader does not keep the log in use.
        let inner = Arc::downgrade(&self.inner);
        tokio::spawn(async move {
            loop {
                changed.mark_unchanged();
                while let Some(chunk) = reader.next(inner.upgrade().as_deref()) {
                    if sender.send(chunk).await.is_err() {
                        return;
                    }
                }
                if !follow {
                    return;
                }
                tokio::select! {
                    more = changed.changed() => if more.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        });
        receiver
    }

    /// Removes the files. What is written from now on is lost.
    pub(crate) fn remove(&self) {
        for path in [&self.inner.path, &rotated(&self.inner.path)] {
            // The second is there only after a rotation.
            let _ = fs::remove_file(path);
        }
    }

    fn rotate(&self, current: &mut Current) -> io::Result<()> {
        fs::rename(&self.inner.path, rotated(&self.inner.path))?;
        current.file = append(&self.inner.path)?;
        current.length = 0;
        current.generation += 1;
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Current> {
        self.inner
            .file
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The files still to be read, the oldest first.
struct Reader {
    older: Option<File>,
    file: Option<File>,
    generation: u64,
}

impl Reader {
    fn open(log: &Log) -> Self {
        // Under the lock, so that no rotation comes between the two.
        let current = log.lock();
        Self {
            older: File::open(rotated(&log.inner.path)).ok(),
            file: File::open(&log.inner.path).ok(),
            generation: current.generation,
        }
    }

    /// The next chunk, `None` if there is none yet.
    fn next(&mut self, log: Option<&Inner>) -> Option<Vec<u8>> {
        loop {
            if let Some(chunk) = self.older.as_mut().and_then(chunk) {
                return Some(chunk);
            }
            self.older = None;
            if let Some(chunk) = self.file.as_mut().and_then(chunk) {
                return Some(chunk);
            }
            let log = log?;
            let current = log.file.lock().unwrap_or_else(PoisonError::into_inner);
            if current.generation == self.generation {
                return None;
            }
            // What was written between the last look and the rotation comes before the new file.
            self.older = self.file.take();
            self.file = File::open(&log.path).ok();
            self.generation = current.generation;
        }
    }
}

fn chunk(file: &mut File) -> Option<Vec<u8>> {
    let mut bytes = vec![0; CHUNK_BYTES];
    match file.read(&mut bytes) {
        Ok(read @ 1..) => {
            bytes.truncate(read);
            Some(bytes)
        }
        _ => None,
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

fn rotated(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn all(mut receiver: mpsc::Receiver<Vec<u8>>) -> String {
        let mut text = Vec::new();
        while let Some(chunk) = receiver.recv().await {
            text.extend(chunk);
        }
        String::from_utf8(text).unwrap()
    }

    #[tokio::test]
    async fn size_is_bounded_and_readers_see_all_that_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::bounded(dir.path().join("a/b.log"), 10).unwrap();
        for number in 10..60 {
            log.write(format!("line {number}\n").as_bytes());
        }
        let sizes: u64 = fs::read_dir(dir.path().join("a"))
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        assert!(sizes <= 2 * 18, "{sizes}");
        let text = all(log.read(false)).await;
        assert!(
            text.starts_with("line 5") && text.ends_with("line 59\n"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn followers_miss_nothing_over_rotations() {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::bounded(dir.path().join("b.log"), 100).unwrap();
        log.write(b"0\n");
        let mut receiver = log.read(true);
        let mut text = receiver.recv().await.unwrap();
        let mut pipe = File::from(log.pipe().unwrap());
        for number in 1..200 {
            pipe.write_all(format!("{number}\n").as_bytes()).unwrap();
            let expected = format!("{number}\n");
            while !text.ends_with(expected.as_bytes()) {
                text.extend(receiver.recv().await.unwrap());
            }
        }
        drop((pipe, log));
        text.extend(all(receiver).await.bytes());
        let expected: String = (0..200).map(|number| format!("{number}\n")).collect();
        assert_eq!(String::from_utf8(text).unwrap(), expected);
    }
}
