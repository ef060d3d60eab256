//! When to read the folder again: shortly after the file system says that something changed, and every few
//! seconds in case it said nothing (network file systems, exhausted inotify watches, a folder that was moved).

use std::{path::PathBuf, sync::Arc, time::Duration};

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
const RESCAN: Duration = Duration::from_secs(3);

/// Sends a scan whenever the folder has changed, until the receiver is gone. `last` is what is known already.
pub(crate) async fn follow(folder: PathBuf, mut last: Scan, scans: mpsc::Sender<Scan>) {
    let events = Arc::new(Notify::new());
    let mut watcher = start_watcher(&folder, &events);
    loop {
        tokio::select! {
            () = wait_for_quiet(&events) => {}
            () = sleep(RESCAN) => {
                // The folder itself may have been replaced, which ends the old watch.
                if let Some(watcher) = &mut watcher {
                    let _ = watcher.unwatch(&folder);
                    let _ = watcher.watch(&folder, RecursiveMode::Recursive);
                }
            }
            () = scans.closed() => return,
        }
        let path = folder.clone();
        let Ok(current) = tokio::task::spawn_blocking(move || scan(&path)).await else {
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

fn start_watcher(folder: &std::path::Path, events: &Arc<Notify>) -> Option<RecommendedWatcher> {
    let sender = Arc::clone(events);
    let handler = move |event: notify::Result<notify::Event>| {
        // Reading the files is an event too; answering it would never end.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            sender.notify_one();
        }
    };
    let started = notify::recommended_watcher(handler).and_then(|mut watcher| {
        watcher.watch(folder, RecursiveMode::Recursive)?;
        Ok(watcher)
    });
    started
        .inspect_err(|error| {
            tracing::warn!(%error, folder = %folder.display(), "cannot watch the folder: changes apply within {RESCAN:?} instead of at once");
        })
        .ok()
}
