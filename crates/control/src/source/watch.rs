//! When to read the folder again: shortly after the file system says that something changed, and every few
//! seconds in case it said nothing (network file systems, exhausted inotify watches, a folder that was moved).

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{Scan, scan};

/// Quiet time after the last event before the folder is read: editors write, rename and remove in bursts.
const QUIET: Duration = Duration::from_millis(60);
/// Longest wait if the events never stop.
const MAX_WAIT: Duration = Duration::from_millis(500);
/// Time between readings without any event.
const RESCAN: Duration = Duration::from_secs(5);

/// Hears of changes from the moment it is made, so that one between the first scan and
/// [`Watch::follow`] is not missed.
pub(crate) struct Watch {
    folder: PathBuf,
    events: Arc<Notify>,
    watcher: Option<RecommendedWatcher>,
}

impl Watch {
    pub(crate) fn start(folder: &Path) -> Self {
        let events = Arc::new(Notify::new());
        let mut watch = Self {
            folder: folder.to_owned(),
            watcher: watcher(&events),
            events,
        };
        watch.renew();
        watch
    }

    /// Sends a scan whenever the folder differs from `last`, which is what the receiver knows already, until the
    /// receiver is gone.
    pub(crate) async fn follow(mut self, mut last: Scan, scans: mpsc::Sender<Scan>) {
        loop {
            tokio::select! {
                () = wait_for_quiet(&self.events) => {}
                // The folder itself may have been replaced, which ends the old watch.
                () = sleep(RESCAN) => self.renew(),
                () = scans.closed() => return,
            }
            let folder = self.folder.clone();
            let Ok(current) = tokio::task::spawn_blocking(move || scan(&folder)).await else {
                continue;
            };
            if current != last {
                last = current.clone();
                if scans.send(current).await.is_err() {
                    return;
                }
            }
        }
    }

    fn renew(&mut self) {
        let Some(watcher) = &mut self.watcher else {
            return;
        };
        // Fails if nothing is watched yet, or no longer: that is what the next line is for.
        let _ = watcher.unwatch(&self.folder);
        if let Err(error) = watcher.watch(&self.folder, RecursiveMode::Recursive) {
            tracing::debug!(%error, folder = %self.folder.display(), "cannot watch the folder: changes apply within {RESCAN:?} instead of at once");
        }
    }
}

async fn wait_for_quiet(events: &Notify) {
    events.notified().await;
    let latest = Instant::now() + MAX_WAIT;
    loop {
        tokio::select! {
            () = sleep_until(latest) => return,
            quiet = timeout(QUIET, events.notified()) => if quiet.is_err() { return },
        }
    }
}

fn watcher(events: &Arc<Notify>) -> Option<RecommendedWatcher> {
    let sender = Arc::clone(events);
    let handler = move |event: notify::Result<notify::Event>| {
        // Reading the files is an event too; answering it would never end.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            sender.notify_one();
        }
    };
    notify::recommended_watcher(handler)
        .inspect_err(|error| {
            tracing::warn!(%error, "cannot watch folders: changes apply within {RESCAN:?} instead of at once");
        })
        .ok()
}
