//! The starter's side of `api::enroll`: tells a node's agent of workloads, and keeps descriptors for it.
//!
//! The server outlives agents. To each that connects it tells all that it holds, then changes as they
//! come. An agent that reads too slowly is disconnected, and hears everything anew when it is back:
//! nothing is queued without bound, and nothing is lost.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use api::enroll::{EnrolledWorkload, FromAgent, ToAgent};
use linux::{
    netns::Netns,
    seqpacket::{Listener, Stream},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

use crate::error::{During, Error};

/// Most descriptors that are kept for one node's agent: a few dozen for each of the most pods a node can have.
pub const MAX_STORED: usize = 8192;
/// Changes that an agent may be behind.
const QUEUE: usize = 1024;

/// What the agent said of a workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Enrolment {
    /// Nothing yet: its program must not start.
    Waiting,
    /// Policy is in place.
    Ready,
    /// It must not start, for this reason.
    Refused(String),
}

/// Makes join tokens for a node's agent ([`ToAgent::JoinToken`]).
pub type JoinTokens = Arc<dyn Fn(&str) -> String + Send + Sync>;

/// The server for one node.
pub struct EnrollServer {
    node: String,
    resolver: Netns,
    tokens: JoinTokens,
    state: Mutex<State>,
    connected: watch::Sender<bool>,
    taken_over: watch::Sender<Option<i32>>,
    leaving: watch::Sender<Option<i32>>,
    accepting: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct State {
    stored: BTreeMap<String, Arc<OwnedFd>>,
    workloads: BTreeMap<String, Entry>,
    /// Workloads that were removed and that the agent is asked to let go of.
    going: BTreeMap<String, oneshot::Sender<()>>,
    agent: Option<mpsc::Sender<Outgoing>>,
}

#[derive(Debug)]
struct Entry {
    workload: EnrolledWorkload,
    netns: Netns,
    enrolment: watch::Sender<Enrolment>,
    /// Whether it was said to be draining.
    draining: bool,
}

#[derive(Debug)]
struct Outgoing {
    message: ToAgent,
    descriptor: Option<Descriptor>,
}

#[derive(Debug)]
enum Descriptor {
    Netns(Netns),
    Stored(Arc<OwnedFd>),
}

impl EnrollServer {
    /// Listens on `socket`. `resolver` is the namespace from which the machine's resolver is reachable.
    /// `tokens` makes what the agent proves itself to the control plane with. Needs a tokio runtime.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn start(
        socket: &Path,
        node: &str,
        resolver: Netns,
        tokens: JoinTokens,
    ) -> Result<Arc<Self>, Error> {
        if let Some(folder) = socket.parent() {
            std::fs::create_dir_all(folder).during(|| format!("create {}", folder.display()))?;
        }
        let listener = Listener::bind(socket)?;
        let server = Arc::new(Self {
            node: node.into(),
            resolver,
            tokens,
            state: Mutex::new(State::default()),
            connected: watch::Sender::new(false),
            taken_over: watch::Sender::new(None),
            leaving: watch::Sender::new(None),
            accepting: Mutex::new(None),
        });
        let accepting = tokio::spawn(accept(Arc::downgrade(&server), listener));
        *lock(&server.accepting) = Some(accepting);
        Ok(server)
    }

    /// Announces a workload; the receiver says when its program may start. A workload that is known under
    /// the same instance keeps what was said of it.
    pub fn add(&self, workload: EnrolledWorkload, netns: Netns) -> watch::Receiver<Enrolment> {
        let mut state = lock(&self.state);
        if let Some(known) = state.workloads.get(&workload.uid)
            && known.workload == workload
        {
            return known.enrolment.subscribe();
        }
        let (enrolment, receiver) = watch::channel(Enrolment::Waiting);
        let message = ToAgent::WorkloadAdded(workload.clone());
        let entry = Entry {
            workload,
            netns: netns.clone(),
            enrolment,
            draining: false,
        };
        state.workloads.insert(entry.workload.uid.clone(), entry);
        state.tell(message, Some(Descriptor::Netns(netns)));
        receiver
    }

    /// Says that a workload is to stop soon.
    pub fn drain(&self, uid: &str) {
        let mut state = lock(&self.state);
        if let Some(entry) = state.workloads.get_mut(uid) {
            entry.draining = true;
            state.tell(ToAgent::WorkloadDraining { uid: uid.into() }, None);
        }
    }

    /// Takes a workload back, and drops the descriptors stored under its name. The receiver ends when the agent has let
    /// go of the workload's namespace, or cannot say so any more.
    pub fn remove(&self, uid: &str) -> oneshot::Receiver<()> {
        let (gone, receiver) = oneshot::channel();
        let mut state = lock(&self.state);
        if state.workloads.remove(uid).is_some() {
            state.stored.retain(|name, _| !belongs_to(name, uid));
            if state.tell(ToAgent::WorkloadRemoved { uid: uid.into() }, None) {
                state.going.insert(uid.into(), gone);
            }
        }
        receiver
    }

    /// Whether an agent is connected.
    #[must_use]
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.connected.subscribe()
    }

    /// The process id of the agent that took over last.
    #[must_use]
    pub fn taken_over(&self) -> watch::Receiver<Option<i32>> {
        self.taken_over.subscribe()
    }

    /// The process id of the agent that said last that it leaves.
    #[must_use]
    pub fn leaving(&self) -> watch::Receiver<Option<i32>> {
        self.leaving.subscribe()
    }

    /// How many descriptors are kept.
    #[must_use]
    pub fn stored(&self) -> usize {
        lock(&self.state).stored.len()
    }

    /// Greets an agent, then serves it until it goes or is replaced.
    async fn serve(&self, stream: Stream) -> Result<(), Error> {
        let peer = stream.peer_cred()?;
        let hello = stream.recv::<FromAgent>().await?;
        match hello {
            Some((FromAgent::Hello { node }, _)) if node == self.node && peer.uid == 0 => {}
            other => {
                tracing::warn!(
                    node = self.node,
                    ?other,
                    uid = peer.uid,
                    "stranger on the enrolment socket"
                );
                return Ok(());
            }
        }
        let (snapshot, mut changes) = self.snapshot();
        self.connected.send_replace(true);
        for outgoing in &snapshot {
            send(&stream, outgoing).await?;
        }
        drop(snapshot);
        loop {
            tokio::select! {
                change = changes.recv() => match change {
                    Some(outgoing) => send(&stream, &outgoing).await?,
                    // Another agent has connected, or this one was too slow.
                    None => return Ok(()),
                },
                said = stream.recv::<FromAgent>() => match said? {
                    Some((FromAgent::JoinTokenWanted, _)) => {
                        let token = (self.tokens)(&self.node);
                        stream.send(&ToAgent::JoinToken { token }, &[]).await?;
                    }
                    Some((message, descriptors)) => self.hear(peer.pid, message, descriptors),
                    None => return Ok(()),
                },
            }
        }
    }

    /// All that is held, and from there on the changes, without a gap between the two.
    fn snapshot(&self) -> (Vec<Outgoing>, mpsc::Receiver<Outgoing>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let mut state = lock(&self.state);
        let hello = Outgoing {
            message: ToAgent::Hello {
                node: self.node.clone(),
            },
            descriptor: Some(Descriptor::Netns(self.resolver.clone())),
        };
        let stored = state.stored.iter().map(|(name, descriptor)| Outgoing {
            message: ToAgent::StoredFd { name: name.clone() },
            descriptor: Some(Descriptor::Stored(descriptor.clone())),
        });
        let workloads = state.workloads.values().map(|entry| Outgoing {
            message: ToAgent::WorkloadAdded(entry.workload.clone()),
            descriptor: Some(Descriptor::Netns(entry.netns.clone())),
        });
        let draining = state.workloads.values().filter(|entry| entry.draining);
        let draining = draining.map(|entry| Outgoing {
            message: ToAgent::WorkloadDraining {
                uid: entry.workload.uid.clone(),
            },
            descriptor: None,
        });
        let done = Outgoing {
            message: ToAgent::SnapshotDone,
            descriptor: None,
        };
        let snapshot = std::iter::once(hello)
            .chain(stored)
            .chain(workloads)
            .chain(draining)
            .chain([done])
            .collect();
        state.agent = Some(sender);
        // An earlier agent cannot say any more that it has let go; this one never had them.
        state.going.clear();
        (snapshot, receiver)
    }

    fn hear(&self, pid: i32, message: FromAgent, mut descriptors: Vec<OwnedFd>) {
        let mut state = lock(&self.state);
        match message {
            FromAgent::Hello { .. } | FromAgent::JoinTokenWanted => {}
            FromAgent::WorkloadGone { uid } => drop(state.going.remove(&uid)),
            FromAgent::Leaving => drop(self.leaving.send_replace(Some(pid))),
            FromAgent::TakenOver => drop(self.taken_over.send_replace(Some(pid))),
            FromAgent::WorkloadReady { uid } => state.enrolled(&uid, Enrolment::Ready),
            FromAgent::WorkloadRefused { uid, error } => {
                state.enrolled(&uid, Enrolment::Refused(error));
            }
            FromAgent::StoreFd { name } => {
                let Some(descriptor) = descriptors.pop() else {
                    tracing::warn!(
                        node = self.node,
                        name,
                        "nothing to store came with the message"
                    );
                    return;
                };
                if state.stored.len() >= MAX_STORED && !state.stored.contains_key(&name) {
                    tracing::warn!(
                        node = self.node,
                        name,
                        "descriptor not stored: {MAX_STORED} are kept already"
                    );
                    return;
                }
                state.stored.insert(name, Arc::new(descriptor));
            }
            FromAgent::DropFd { name } => {
                state.stored.remove(&name);
            }
        }
    }
}

impl std::fmt::Debug for EnrollServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EnrollServer")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

impl Drop for EnrollServer {
    fn drop(&mut self) {
        if let Some(accepting) = lock(&self.accepting).take() {
            accepting.abort();
        }
    }
}

impl State {
    /// Returns whether there is an agent that will hear it.
    fn tell(&mut self, message: ToAgent, descriptor: Option<Descriptor>) -> bool {
        let Some(agent) = &self.agent else {
            return false;
        };
        // Full or closed: the connection ends, and the next one begins with a snapshot.
        let told = agent
            .try_send(Outgoing {
                message,
                descriptor,
            })
            .is_ok();
        if !told {
            self.agent = None;
            self.going.clear();
        }
        told
    }

    fn enrolled(&mut self, uid: &str, enrolment: Enrolment) {
        match self.workloads.get(uid) {
            Some(entry) => drop(entry.enrolment.send_replace(enrolment)),
            // It was removed while the agent was busy with it.
            None => tracing::debug!(uid, "word of a workload that is gone"),
        }
    }
}

async fn accept(server: std::sync::Weak<EnrollServer>, listener: Listener) {
    // One agent at a time: a newer one is the one that runs.
    let mut serving: Option<JoinHandle<()>> = None;
    loop {
        let accepted = listener.accept().await;
        let Some(server) = server.upgrade() else {
            return;
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(node = server.node, %error, "agent cannot connect");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        if let Some(old) = serving.take() {
            old.abort();
        }
        serving = Some(tokio::spawn(async move {
            if let Err(error) = server.serve(stream).await {
                tracing::debug!(node = server.node, %error, "connection to the agent ended");
            }
            lock(&server.state).going.clear();
            server.connected.send_replace(false);
        }));
    }
}

async fn send(stream: &Stream, outgoing: &Outgoing) -> Result<(), Error> {
    let sent = match &outgoing.descriptor {
        None => stream.send(&outgoing.message, &[]).await,
        Some(Descriptor::Netns(netns)) => stream.send(&outgoing.message, &[netns.as_fd()]).await,
        Some(Descriptor::Stored(descriptor)) => {
            stream.send(&outgoing.message, &[descriptor.as_fd()]).await
        }
    };
    Ok(sent?)
}

/// Names end with the uid of the workload that they belong to, and maybe with its instance: `KIND/NAMESPACE/POD@INSTANCE`.
fn belongs_to(name: &str, uid: &str) -> bool {
    let name = name.split_once('@').map_or(name, |(name, _)| name);
    name.strip_suffix(uid)
        .is_some_and(|kind| kind.ends_with('/'))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds the lock.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn workload(uid: &str) -> EnrolledWorkload {
        let (namespace, name) = uid.split_once('/').unwrap();
        EnrolledWorkload {
            uid: uid.into(),
            namespace: namespace.into(),
            name: name.into(),
            workload: "web".into(),
            service_account: "web".into(),
            addresses: Vec::new(),
            cgroup: "/".into(),
            host_ifindex: 1000,
            mac: [0; 6],
            instance: "1".into(),
        }
    }

    async fn next(agent: &Stream) -> (ToAgent, usize) {
        let (message, descriptors) = agent.recv::<ToAgent>().await.unwrap().unwrap();
        (message, descriptors.len())
    }

    async fn connect(path: &Path) -> Stream {
        let agent = Stream::connect(path).await.unwrap();
        agent
            .send(&FromAgent::Hello { node: "one".into() }, &[])
            .await
            .unwrap();
        let hello = next(&agent).await;
        assert_eq!(hello, (ToAgent::Hello { node: "one".into() }, 1));
        agent
    }

    #[tokio::test]
    async fn agents_come_and_go_and_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("enroll.sock");
        let netns = Netns::current().unwrap();
        let server = EnrollServer::start(
            &path,
            "one",
            netns.clone(),
            Arc::new(|node| format!("token of {node}")),
        )
        .unwrap();
        let mut first = server.add(workload("shop/a-0"), netns.clone());
        assert_eq!(*first.borrow(), Enrolment::Waiting);

        let agent = connect(&path).await;
        assert_eq!(
            next(&agent).await,
            (ToAgent::WorkloadAdded(workload("shop/a-0")), 1)
        );
        assert_eq!(next(&agent).await, (ToAgent::SnapshotDone, 0));
        let uid = "shop/a-0".to_owned();
        agent
            .send(&FromAgent::WorkloadReady { uid: uid.clone() }, &[])
            .await
            .unwrap();
        first
            .wait_for(|said| *said == Enrolment::Ready)
            .await
            .unwrap();

        let mut second = server.add(workload("shop/b-0"), netns.clone());
        assert_eq!(
            next(&agent).await,
            (ToAgent::WorkloadAdded(workload("shop/b-0")), 1)
        );
        let (mut reader, writer) = std::io::pipe().unwrap();
        for name in ["dns-udp/shop/a-0@1", "dns-udp/shop/b-0@1"] {
            let message = FromAgent::StoreFd { name: name.into() };
            agent.send(&message, &[writer.as_fd()]).await.unwrap();
        }
        agent.send(&FromAgent::JoinTokenWanted, &[]).await.unwrap();
        let token = "token of one".to_owned();
        assert_eq!(next(&agent).await, (ToAgent::JoinToken { token }, 0));
        let refused = FromAgent::WorkloadRefused {
            uid: "shop/b-0".into(),
            error: "no policy".into(),
        };
        agent.send(&refused, &[]).await.unwrap();
        second
            .wait_for(|said| *said == Enrolment::Refused("no policy".into()))
            .await
            .unwrap();
        let mut taken_over = server.taken_over();
        assert_eq!(*taken_over.borrow(), None);
        agent.send(&FromAgent::TakenOver, &[]).await.unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        taken_over
            .wait_for(|agent| *agent == Some(own))
            .await
            .unwrap();
        let mut leaving = server.leaving();
        agent.send(&FromAgent::Leaving, &[]).await.unwrap();
        leaving.wait_for(|agent| *agent == Some(own)).await.unwrap();
        drop((agent, writer));

        // The next agent gets back what the first stored, and what was said stays said.
        drop(server.remove("shop/b-0"));
        server.drain("shop/a-0");
        let agent = connect(&path).await;
        let (message, mut descriptors) = agent.recv::<ToAgent>().await.unwrap().unwrap();
        assert_eq!(
            message,
            ToAgent::StoredFd {
                name: "dns-udp/shop/a-0@1".into()
            }
        );
        let mut stored = std::fs::File::from(descriptors.remove(0));
        stored.write_all(b"still open").unwrap();
        drop(stored);
        assert_eq!(
            next(&agent).await,
            (ToAgent::WorkloadAdded(workload("shop/a-0")), 1)
        );
        let draining = ToAgent::WorkloadDraining { uid: uid.clone() };
        assert_eq!(next(&agent).await, (draining, 0));
        assert_eq!(next(&agent).await, (ToAgent::SnapshotDone, 0));
        assert_eq!(
            *server.add(workload("shop/a-0"), netns).borrow(),
            Enrolment::Ready
        );
        let mut gone = server.remove("shop/a-0");
        let removed = ToAgent::WorkloadRemoved { uid: uid.clone() };
        assert_eq!(next(&agent).await, (removed, 0));
        assert_eq!(gone.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        let message = FromAgent::WorkloadGone { uid };
        agent.send(&message, &[]).await.unwrap();
        // The other end is dropped: there is nothing to say beside that.
        gone.await.unwrap_err();
        assert_eq!(server.stored(), 0);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "still open");
    }
}
