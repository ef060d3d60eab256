//! What went between datagram sockets, as the kernel counts it. Datagrams have no end that the kernel could see: who reads
//! the records decides when one is over, and takes it out.

use aya::maps::{HashMap as BpfHashMap, MapData, MapError};

use crate::{DatagramFlow, KernelError, Tuple};

const NAME: &str = "datagrams";

/// The node's datagram records.
#[derive(Debug)]
pub struct Datagrams {
    map: BpfHashMap<MapData, Tuple, DatagramFlow>,
}

impl Datagrams {
    pub(crate) fn new(map: BpfHashMap<MapData, Tuple, DatagramFlow>) -> Self {
        Self { map }
    }

    /// All records as they are now. One that the kernel adds meanwhile may be missed.
    ///
    /// # Errors
    /// Fails if the kernel refuses the read.
    pub fn all(&self) -> Result<Vec<(Tuple, DatagramFlow)>, KernelError> {
        self.map
            .iter()
            .collect::<Result<_, _>>()
            .map_err(|source| KernelError::map(NAME, source))
    }

    /// Takes a record out. Returns it as it was last, or `None` if it was gone already.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn take(&mut self, tuple: &Tuple) -> Result<Option<DatagramFlow>, KernelError> {
        let last = match self.map.get(tuple, 0) {
            Ok(flow) => flow,
            Err(MapError::KeyNotFound) => return Ok(None),
            Err(source) => return Err(KernelError::map(NAME, source)),
        };
        match self.map.remove(tuple) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(Some(last)),
            Err(source) => Err(KernelError::map(NAME, source)),
        }
    }
}
