//! Steering (`bpf/steer.h`): one listener of the agent's and one link per workload. The listener is entered into a map
//! before the namespace's program that looks for it is put in place or replaced, so that a steered connection always finds one.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use crate::{
    AttachedProgram, Kernel, KernelError, attach, loader,
    maps::{self, Place},
    raw::{self, Existing},
};

/// The map of listeners, and the workloads that are in it.
pub(crate) struct Steering {
    map: OwnedFd,
    capacity: u32,
    setting: &'static str,
    links: PathBuf,
    entered: BTreeSet<u32>,
    /// Namespaces that get their program when the others are put in place; `None` once they are.
    waiting: Option<BTreeMap<u32, OwnedFd>>,
}

impl Kernel {
    /// Leads what arrives in a workload's namespace from outside of the node, and what its policy wants the agent to look
    /// at, to `listener`: a TCP socket that listens in that namespace (dual-stack for both IP versions). It may be any
    /// of a group that shares a port (SO_REUSEPORT): connections are spread over the group. Call it again with
    /// another socket to switch over; connections that wait in the first one's queue stay there.
    ///
    /// Before [`Kernel::attach`] only the listener is entered, and the program gets in place with the others: an agent that
    /// takes over enters the listeners of all workloads first, so that none is without. Those it does not enter lose
    /// theirs if the map had to be made anew, and what would be steered there is refused.
    ///
    /// # Errors
    /// [`KernelError::Full`] if there is no room; and if the socket does not listen or the namespace takes no program.
    pub fn steer(
        &mut self,
        workload: u32,
        netns: BorrowedFd<'_>,
        listener: BorrowedFd<'_>,
    ) -> Result<(), KernelError> {
        let steering = &mut self.steering;
        steering.enter(workload, listener)?;
        if let Some(waiting) = &mut steering.waiting {
            let netns = netns.try_clone_to_owned().map_err(failed)?;
            waiting.insert(workload, netns);
            return Ok(());
        }
        let program = loader::program(&self.object, attach::STEER_PROGRAM)?.as_fd();
        let attached = attach::to_namespace(&steering.links, workload, program, netns)?;
        self.note_attached(attached);
        Ok(())
    }

    /// Ends steering in a workload's namespace. Its own listeners are asked again, and what policy wants the agent to look at
    /// is refused.
    ///
    /// # Errors
    /// Fails if the pin or the map's entry cannot be removed.
    pub fn unsteer(&mut self, workload: u32) -> Result<(), KernelError> {
        let steering = &mut self.steering;
        if let Some(waiting) = &mut steering.waiting {
            waiting.remove(&workload);
        }
        let pin = attach::from_namespace(&steering.links, workload)
            .map_err(|source| steering.pin_folder(source))?;
        raw::delete(steering.map.as_fd(), &workload.to_ne_bytes()).map_err(failed)?;
        steering.entered.remove(&workload);
        self.attached.retain(|other| other.pin != pin);
        Ok(())
    }

    /// Workloads whose namespaces have the program, whoever put it there: what is not wanted any more is to be ended
    /// ([`Kernel::unsteer`]).
    ///
    /// # Errors
    /// Fails if the pins cannot be listed.
    pub fn steered(&self) -> Result<Vec<u32>, KernelError> {
        let steering = &self.steering;
        attach::steered(&steering.links).map_err(|source| steering.pin_folder(source))
    }

    /// Puts the program in place in every namespace that waits for it, or has an earlier agent's.
    pub(crate) fn attach_steering(&mut self) -> Result<(), KernelError> {
        let links = &self.steering.links;
        let program = loader::program(&self.object, attach::STEER_PROGRAM)?.as_fd();
        let none = BTreeMap::new();
        let waiting = self.steering.waiting.as_ref().unwrap_or(&none);
        let mut attached = Vec::new();
        for (workload, netns) in waiting {
            attached.push(attach::to_namespace(
                links,
                *workload,
                program,
                netns.as_fd(),
            )?);
        }
        for workload in self.steered()? {
            if !waiting.contains_key(&workload) {
                attached.extend(attach::renew_namespace(links, workload, program)?);
            }
        }
        attached
            .into_iter()
            .for_each(|attached| self.note_attached(attached));
        Ok(())
    }

    fn note_attached(&mut self, attached: AttachedProgram) {
        self.attached.retain(|other| other.pin != attached.pin);
        self.attached.push(attached);
    }
}

impl Steering {
    pub(crate) fn new(map: OwnedFd, place: &Place, links: PathBuf) -> Self {
        Self {
            map,
            capacity: place.entries,
            setting: place.spec.setting.unwrap_or(maps::INBOUND),
            links,
            entered: BTreeSet::new(),
            waiting: Some(BTreeMap::new()),
        }
    }

    /// How many workloads have a listener of this agent's.
    pub(crate) fn len(&self) -> usize {
        self.entered.len()
    }

    /// From now on namespaces get their program at once.
    pub(crate) fn in_place(&mut self) {
        self.waiting = None;
    }

    fn enter(&mut self, workload: u32, listener: BorrowedFd<'_>) -> Result<(), KernelError> {
        let socket = listener.as_raw_fd().to_ne_bytes();
        let key = workload.to_ne_bytes();
        let has_room =
            raw::update(self.map.as_fd(), &key, &socket, Existing::Replace).map_err(failed)?;
        if !has_room {
            return Err(KernelError::Full {
                table: maps::INBOUND,
                capacity: self.capacity,
                setting: self.setting,
            });
        }
        self.entered.insert(workload);
        Ok(())
    }

    fn pin_folder(&self, source: io::Error) -> KernelError {
        KernelError::PinFolder {
            path: self.links.clone(),
            source,
        }
    }
}

/// The map's own descriptor, for calls that the loader library has no type for.
pub(crate) fn duplicate(map: &aya::maps::MapData) -> Result<OwnedFd, KernelError> {
    map.fd().as_fd().try_clone_to_owned().map_err(failed)
}

fn failed(source: io::Error) -> KernelError {
    KernelError::Batch {
        table: maps::INBOUND,
        source,
    }
}
