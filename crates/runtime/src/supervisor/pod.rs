//! One pod's life, as one task: a place is made, containers run in it one after the other, the place is cleared.
//!
//! The task looks at what is wanted wherever it waits, so that a pod can be stopped at any point. What a
//! change needs is in [`Change`]; a change of labels needs nothing.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use api::pod::{PodPhase, PodSpec, RestartPolicy};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    SHUTDOWN_GRACE, Shared, lock,
    place::{self, Place},
};
use crate::{
    backoff::Backoff,
    container::{Container, Exit},
    enroll::Enrolment,
    error::Error,
    exec::ExecSpec,
    logs::Log,
    probe::{ProbeTarget, Prober},
};

const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// A program that ran that long starts its next restarts without a wait to speak of.
const STABLE_RUN: Duration = Duration::from_secs(30);

/// What the supervisor keeps of a pod.
#[derive(Debug)]
pub(super) struct PodHandle {
    wanted: watch::Sender<Option<Arc<PodSpec>>>,
    inside: Arc<Mutex<Option<ExecSpec>>>,
    log: Log,
}

impl PodHandle {
    /// Starts the pod's task.
    pub(super) fn start(shared: &Arc<Shared>, spec: &Arc<PodSpec>, log: Log) -> Self {
        let (wanted, receiver) = watch::channel(Some(Arc::clone(spec)));
        let inside = Arc::default();
        shared.statuses.begin(spec);
        let task = PodTask {
            uid: spec.uid.clone(),
            shared: Arc::clone(shared),
            wanted: receiver,
            inside: Arc::clone(&inside),
            log: log.clone(),
            backoff: Backoff::new(FIRST_WAIT, LONGEST_WAIT, STABLE_RUN),
        };
        tokio::spawn(task.run());
        Self {
            wanted,
            inside,
            log,
        }
    }

    pub(super) fn want(&self, spec: Option<Arc<PodSpec>>) {
        self.wanted.send_if_modified(|wanted| {
            let changed = *wanted != spec;
            *wanted = spec;
            changed
        });
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.borrow().is_some()
    }

    pub(super) fn exec_spec(&self) -> Option<ExecSpec> {
        lock(&self.inside).clone()
    }

    pub(super) fn log(&self) -> &Log {
        &self.log
    }
}

/// What the difference between what runs and what is wanted asks for.
#[derive(Debug, Clone)]
enum Change {
    /// The program anew, in the same place.
    Restart(Arc<PodSpec>),
    /// Everything anew: the identity or the node is another one. Or nothing at all any more.
    Leave,
}

struct PodTask {
    uid: String,
    shared: Arc<Shared>,
    wanted: watch::Receiver<Option<Arc<PodSpec>>>,
    inside: Arc<Mutex<Option<ExecSpec>>>,
    log: Log,
    backoff: Backoff,
}

impl PodTask {
    async fn run(mut self) {
        loop {
            let spec = self.wanted.borrow_and_update().clone();
            match spec {
                Some(spec) => self.live(spec).await,
                None if self.shared.forget(&self.uid) => return,
                None => {}
            }
        }
    }

    /// From the making of the place to its clearing.
    async fn live(&mut self, spec: Arc<PodSpec>) {
        self.shared.statuses.begin(&spec);
        let made = {
            // Never closed: an error would only mean that no permit is needed.
            let _permit = self.shared.starts.acquire().await;
            Place::make(&self.shared, &spec).await
        };
        let mut place = match made {
            Ok(place) => place,
            Err(error) => {
                self.wait_after(&spec, Duration::ZERO, error.to_string())
                    .await;
                return;
            }
        };
        let addresses = place.network.addresses.to_vec();
        self.shared
            .statuses
            .change(&self.uid, |status| status.addresses = addresses);
        let mut spec = spec;
        while let Change::Restart(changed) = self.contain(&mut place, &spec).await {
            spec = changed;
        }
        place.clear().await;
    }

    /// Runs the program again and again in one place, until a change asks for something else.
    async fn contain(&mut self, place: &mut Place, spec: &Arc<PodSpec>) -> Change {
        loop {
            if let Some(change) = self.enrolled(place, spec).await {
                return change;
            }
            let begun = Instant::now();
            let started = {
                let _permit = self.shared.starts.acquire().await;
                place.start(spec, &self.log).await
            };
            let ended = match started {
                Ok((container, limits)) => {
                    let inside = place.inside(spec, &container, &limits);
                    *lock(&self.inside) = Some(inside.clone());
                    let complaint = place::complaint(&limits);
                    let ended = self.attend(place, spec, container, inside, complaint).await;
                    *lock(&self.inside) = None;
                    ended
                }
                Err(error) => Ended::ByItself {
                    success: false,
                    message: self.tell_in_log(&error),
                },
            };
            let (success, message) = match ended {
                Ended::ByItself { success, message } => (success, message),
                Ended::For(change) => return change,
            };
            let again = match spec.restart_policy {
                RestartPolicy::Always => true,
                RestartPolicy::OnFailure => !success,
                RestartPolicy::Never => false,
            };
            let change = if again {
                self.wait_after(spec, begun.elapsed(), message).await
            } else {
                self.stay_ended(spec, success, message).await
            };
            if let Some(change) = change {
                return change;
            }
        }
    }

    /// Waits until the agent has policy in force. Enforcement comes before the program.
    async fn enrolled(&mut self, place: &mut Place, spec: &Arc<PodSpec>) -> Option<Change> {
        let mut spec = Arc::clone(spec);
        loop {
            let message = match &*place.enrolment.borrow_and_update() {
                Enrolment::Ready => return None,
                Enrolment::Waiting => format!("waits for the agent of node {}", place.node),
                Enrolment::Refused(error) => {
                    format!("refused by the agent of node {}: {error}", place.node)
                }
            };
            self.shared.statuses.change(&self.uid, |status| {
                status.phase = PodPhase::Pending;
                status.message = Some(message);
            });
            tokio::select! {
                _ = place.enrolment.changed() => {}
                change = changed(&mut self.wanted, &mut spec) => return Some(change),
            }
        }
    }

    /// Watches over a running container until it has ended, one way or the other.
    async fn attend(
        &mut self,
        place: &Place,
        spec: &Arc<PodSpec>,
        mut container: Container,
        inside: ExecSpec,
        complaint: Option<String>,
    ) -> Ended {
        self.shared.statuses.change(&self.uid, |status| {
            status.phase = PodPhase::Running;
            status.ready = spec.readiness.is_none();
            // What the last run ended with stays worth knowing until something newer is.
            if complaint.is_some() || status.restarts == 0 {
                status.message = complaint;
            }
        });
        let target = ProbeTarget {
            netns: place.network.netns.clone(),
            address: place.network.addresses[0],
            exec: inside,
            executable: self.shared.config.executable.clone(),
        };
        let mut current = Arc::clone(spec);
        let happened = tokio::select! {
            exit = container.wait() => Happened::Exit(exit),
            change = changed(&mut self.wanted, &mut current) => Happened::Change(change),
            never = readiness(&self.shared, spec, &target) => match never {},
            error = liveness(spec, &target) => Happened::Unhealthy(error),
        };
        self.shared
            .statuses
            .change(&self.uid, |status| status.ready = false);
        match happened {
            Happened::Exit(Ok(exit)) => Ended::ByItself {
                success: exit.is_success(),
                message: exit.to_string(),
            },
            Happened::Exit(Err(error)) => Ended::ByItself {
                success: false,
                message: error.to_string(),
            },
            Happened::Unhealthy(error) => {
                let message = format!("liveness probe failed: {error}");
                tracing::warn!(uid = self.uid, message, "program is stopped");
                self.stop(spec, &mut container).await;
                Ended::ByItself {
                    success: false,
                    message,
                }
            }
            Happened::Change(change) => {
                if matches!(change, Change::Leave) {
                    place.drain();
                    self.shared
                        .statuses
                        .change(&self.uid, |status| status.phase = PodPhase::Terminating);
                }
                self.drain().await;
                self.stop(spec, &mut container).await;
                Ended::For(change)
            }
        }
    }

    /// The pod is out of service; those who do not know yet may still come for a moment.
    async fn drain(&self) {
        let mut hurry = self.shared.hurry.subscribe();
        tokio::select! {
            () = sleep(self.shared.config.drain) => {}
            _ = hurry.wait_for(|hurry| *hurry) => {}
        }
    }

    /// SIGTERM, then SIGKILL to all of it.
    async fn stop(&self, spec: &PodSpec, container: &mut Container) {
        container.terminate().await;
        let mut hurry = self.shared.hurry.subscribe();
        let cut_short = async {
            // It never fails: `shared` holds the sender.
            let _ = hurry.wait_for(|hurry| *hurry).await;
            sleep(SHUTDOWN_GRACE).await;
        };
        let ended = tokio::select! {
            ended = timeout(spec.termination_grace, container.wait()) => ended.is_ok(),
            () = cut_short => false,
        };
        if ended {
            return;
        }
        tracing::info!(uid = self.uid, "program did not end in time and is killed");
        if let Err(error) = container.kill() {
            tracing::warn!(uid = self.uid, %error, "program cannot be killed");
        }
        if let Err(error) = container.wait().await {
            tracing::warn!(uid = self.uid, %error, "program was lost");
        }
    }

    /// Waits before the next start, longer from time to time.
    async fn wait_after(
        &mut self,
        spec: &Arc<PodSpec>,
        ran: Duration,
        message: String,
    ) -> Option<Change> {
        let wait = self.backoff.after(ran);
        tracing::info!(uid = self.uid, message, ?wait, "pod is started again");
        self.shared.statuses.change(&self.uid, |status| {
            status.phase = PodPhase::BackOff;
            status.message = Some(message);
        });
        let mut spec = Arc::clone(spec);
        tokio::select! {
            () = sleep(wait) => {
                self.shared.statuses.change(&self.uid, |status| status.restarts += 1);
                None
            }
            change = changed(&mut self.wanted, &mut spec) => Some(change),
        }
    }

    /// The program has done its work, or has failed for good.
    async fn stay_ended(
        &mut self,
        spec: &Arc<PodSpec>,
        success: bool,
        message: String,
    ) -> Option<Change> {
        self.shared.statuses.change(&self.uid, |status| {
            status.phase = if success {
                PodPhase::Succeeded
            } else {
                PodPhase::Failed
            };
            status.message = Some(message);
        });
        let mut spec = Arc::clone(spec);
        Some(changed(&mut self.wanted, &mut spec).await)
    }

    /// Who looks at the log of a program that does not run should find out why.
    fn tell_in_log(&self, error: &Error) -> String {
        let message = error.to_string();
        if !matches!(error, Error::Container(_)) {
            self.log.write(format!("heddle: {message}\n").as_bytes());
        }
        message
    }
}

enum Happened {
    Exit(Result<Exit, Error>),
    Change(Change),
    Unhealthy(String),
}

enum Ended {
    ByItself { success: bool, message: String },
    For(Change),
}

/// The next change that asks for something. `spec` follows what asks for nothing.
async fn changed(
    wanted: &mut watch::Receiver<Option<Arc<PodSpec>>>,
    spec: &mut Arc<PodSpec>,
) -> Change {
    loop {
        // Looked at first: it may have changed since the spec was taken.
        let now = wanted.borrow_and_update().clone();
        let Some(now) = now else { return Change::Leave };
        let same_place = (&now.node, &now.service_account, &now.workload)
            == (&spec.node, &spec.service_account, &spec.workload);
        if !same_place {
            return Change::Leave;
        }
        if now.template_hash != spec.template_hash {
            return Change::Restart(now);
        }
        *spec = now;
        if wanted.changed().await.is_err() {
            return Change::Leave;
        }
    }
}

/// Keeps the status up to date; never returns.
async fn readiness(shared: &Shared, spec: &PodSpec, target: &ProbeTarget) -> Infallible {
    let Some(probe) = spec.readiness.clone() else {
        return std::future::pending().await;
    };
    let mut prober = Prober::begin(probe, target.clone(), false).await;
    loop {
        let answer = prober.change().await;
        shared.statuses.change(&spec.uid, |status| {
            status.ready = answer.is_ok();
            status.message = answer.err().map(|error| format!("not ready: {error}"));
        });
    }
}

/// Returns when the program is to be restarted, with the reason.
async fn liveness(spec: &PodSpec, target: &ProbeTarget) -> String {
    let Some(probe) = spec.liveness.clone() else {
        return std::future::pending().await;
    };
    let mut prober = Prober::begin(probe, target.clone(), true).await;
    loop {
        if let Err(error) = prober.change().await {
            return error;
        }
    }
}
