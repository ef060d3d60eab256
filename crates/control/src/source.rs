//! The objects' files: reads all of a folder at once, bounded, and says what could not be read.
//!
//! When to read is decided in `source/watch.rs`; what the text means in [`crate::store`].

pub(crate) mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

/// Files of one folder, at most.
pub(crate) const MAX_FILES: usize = 10_000;
/// Bytes of one file, at most.
pub(crate) const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;
/// Bytes of all files, at most.
pub(crate) const MAX_TOTAL_BYTES: u64 = 64 * 1024 * 1024;
/// Folders below each other, at most.
const MAX_DEPTH: usize = 32;

/// What a folder held at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Scan {
    /// Each file's text, or why it could not be read.
    pub(crate) files: BTreeMap<PathBuf, Result<String, String>>,
    /// Why the list of files may be incomplete: whatever is missing from it must then be taken as unchanged.
    pub(crate) incomplete: Vec<(PathBuf, String)>,
}

/// Reads every `*.yaml`, `*.yml` and `*.json` below `folder`. Hidden files and folders are left out, and so
/// are symbolic links that lead out of the folder.
pub(crate) fn scan(folder: &Path) -> Scan {
    let mut walk = Walk {
        scan: Scan::default(),
        root: PathBuf::new(),
        seen: BTreeSet::new(),
        total_bytes: 0,
    };
    match fs::canonicalize(folder) {
        Ok(root) => {
            walk.root = root;
            walk.folder(folder, 0);
        }
        Err(error) => walk.incomplete(folder, &format!("cannot be read: {error}")),
    }
    walk.scan
}

struct Walk {
    scan: Scan,
    root: PathBuf,
    /// Real paths, so that what is reachable by two links is read once and loops end.
    seen: BTreeSet<PathBuf>,
    total_bytes: u64,
}

impl Walk {
    fn folder(&mut self, folder: &Path, depth: usize) {
        if depth > MAX_DEPTH {
            return self.incomplete(folder, &format!("is more than {MAX_DEPTH} folders deep"));
        }
        let entries = match fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>) {
            Ok(entries) => entries,
            Err(error) => {
                return self.incomplete(folder, &format!("cannot be read: {error}"));
            }
        };
        let mut paths: Vec<PathBuf> = entries.iter().map(fs::DirEntry::path).collect();
        paths.sort_unstable();
        for path in paths {
            if !is_hidden(&path) {
                self.entry(&path, depth);
            }
        }
    }

    fn entry(&mut self, path: &Path, depth: usize) {
        let Ok(real) = fs::canonicalize(path) else {
            // A dangling link, or a file that an editor has just renamed: the next scan tells.
            return;
        };
        if !real.starts_with(&self.root) || !self.seen.insert(real.clone()) {
            return;
        }
        if real.is_dir() {
            self.folder(path, depth + 1);
        } else if is_object_file(path) {
            self.file(path);
        }
    }

    fn file(&mut self, path: &Path) {
        if self.scan.files.len() >= MAX_FILES {
            return self.incomplete(path, &format!("is beyond the first {MAX_FILES} files"));
        }
        let text = match read_text(path) {
            Ok(text) => {
                self.total_bytes += text.len() as u64;
                if self.total_bytes > MAX_TOTAL_BYTES {
                    Err(format!(
                        "all files together are larger than {} MiB",
                        MAX_TOTAL_BYTES >> 20
                    ))
                } else {
                    Ok(text)
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => Err(format!("cannot be read: {error}")),
        };
        self.scan.files.insert(path.to_owned(), text);
    }

    fn incomplete(&mut self, path: &Path, reason: &str) {
        // One reason per kind of trouble is enough to act on, and keeps this bounded.
        if self.scan.incomplete.len() < 10 {
            self.scan
                .incomplete
                .push((path.to_owned(), reason.to_owned()));
        }
    }
}

fn read_text(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let bound = MAX_FILE_BYTES >> 20;
        return Err(io::Error::other(format!("it is larger than {bound} MiB")));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        io::Error::other(format!("it is not UTF-8 text (byte {at})"))
    })
}

fn is_object_file(path: &Path) -> bool {
    path.extension().is_some_and(|extension| {
        ["yaml", "yml", "json"]
            .iter()
            .any(|known| extension == *known)
    })
}

fn is_hidden(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn names(scan: &Scan) -> Vec<String> {
        let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        scan.files.keys().map(name).collect()
    }

    #[test]
    fn reads_objects_and_nothing_else() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret.yaml"), "x").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir_all(path("deep/er")).unwrap();
        for name in [
            "a.yaml",
            "b.yml",
            "deep/er/c.json",
            ".hidden.yaml",
            "notes.txt",
            "a.yaml~",
        ] {
            fs::write(path(name), name).unwrap();
        }
        symlink(outside.path().join("secret.yaml"), path("link.yaml")).unwrap();
        symlink(outside.path(), path("out")).unwrap();
        symlink(folder.path(), path("deep/loop")).unwrap();
        symlink("nowhere.yaml", path("dangling.yaml")).unwrap();
        let scan = scan(folder.path());
        assert_eq!(names(&scan), ["a.yaml", "b.yml", "c.json"]);
        assert_eq!(scan.incomplete, []);
    }

    #[test]
    fn follows_links_inside() {
        // The shape in which Kubernetes mounts a ConfigMap.
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("..2024")).unwrap();
        fs::write(folder.path().join("..2024/a.yaml"), "x").unwrap();
        symlink("..2024", folder.path().join("..data")).unwrap();
        symlink("..data/a.yaml", folder.path().join("a.yaml")).unwrap();
        assert_eq!(names(&scan(folder.path())), ["a.yaml"]);
    }

    #[test]
    fn says_what_cannot_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("binary.yaml"), [0xff, 0xfe]).unwrap();
        File::create(path("huge.yaml"))
            .unwrap()
            .set_len(MAX_FILE_BYTES + 1)
            .unwrap();
        fs::write(path("fine.yaml"), "x").unwrap();
        let scan = scan(folder.path());
        let error = |name: &str| scan.files[&path(name)].clone().unwrap_err();
        assert!(error("binary.yaml").contains("not UTF-8"));
        assert!(error("huge.yaml").contains("larger than 4 MiB"));
        assert_eq!(scan.files[&path("fine.yaml")], Ok("x".into()));
        let gone = super::scan(&path("gone"));
        assert!(gone.files.is_empty() && gone.incomplete[0].1.contains("No such file"));
    }
}
