//! What an authority keeps over restarts: one file, replaced as a whole, in a folder of its owner's.
//!
//! A file that cannot be read is an error for the operator to decide on. A new root in its place would end every
//! connection of the mesh.

use std::{
    fs::{File, TryLockError},
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::{AuthorityError, Generation, Stage, jwt::JwtKey, signer::Signer};
use crate::{certificate, files};

const FILE: &str = "ca.json";
const LOCK: &str = "lock";
const VERSION: u32 = 1;

/// The folder, held by one authority.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    /// Locked while this lives.
    _lock: File,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Kept {
    version: u32,
    trust_domain: String,
    generations: Vec<KeptGeneration>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct KeptGeneration {
    stage: Stage,
    operator: bool,
    /// Unix times in seconds.
    since: u64,
    last_expiry: u64,
    certificates: String,
    /// An operator's key is not kept.
    key: Option<String>,
    jwt_key: String,
}

impl Store {
    pub(super) fn open(folder: &Path) -> Result<Self, AuthorityError> {
        let files = |reason| AuthorityError::Files {
            path: folder.to_owned(),
            reason,
        };
        files::private_folder(folder).map_err(files)?;
        let lock = File::create(folder.join(LOCK)).map_err(files)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => files(io::Error::other("another control plane uses it")),
            TryLockError::Error(error) => files(error),
        })?;
        Ok(Self {
            path: folder.join(FILE),
            _lock: lock,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What was saved last; nothing if there never was anything.
    pub(super) fn load(&self, trust_domain: &str) -> Result<Vec<Generation>, AuthorityError> {
        let content = files::read(&self.path).map_err(|reason| AuthorityError::Files {
            path: self.path.clone(),
            reason,
        })?;
        let Some(content) = content else {
            return Ok(Vec::new());
        };
        let kept: Kept =
            serde_json::from_slice(&content).map_err(|error| self.damaged(error.to_string()))?;
        if kept.version != VERSION {
            return Err(self.damaged(format!("version {} is not known", kept.version)));
        }
        if kept.trust_domain != trust_domain {
            return Err(AuthorityError::OtherTrustDomain {
                path: self.path.clone(),
                found: kept.trust_domain,
                expected: trust_domain.to_owned(),
            });
        }
        let generations = kept
            .generations
            .into_iter()
            .map(KeptGeneration::restore)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| self.damaged(error.to_string()))?;
        let signing = generations.iter().filter(|it| it.stage == Stage::Signing);
        if signing.count() != 1 {
            return Err(self.damaged("it must have one root that signs".into()));
        }
        Ok(generations)
    }

    pub(super) fn save(
        &self,
        trust_domain: &str,
        generations: &[Generation],
    ) -> Result<(), AuthorityError> {
        let kept = Kept {
            version: VERSION,
            trust_domain: trust_domain.to_owned(),
            generations: generations.iter().map(KeptGeneration::of).collect(),
        };
        let content = serde_json::to_vec_pretty(&kept).map_err(AuthorityError::crypto)?;
        files::write(&self.path, &content).map_err(|reason| AuthorityError::Files {
            path: self.path.clone(),
            reason,
        })
    }

    fn damaged(&self, reason: String) -> AuthorityError {
        AuthorityError::Damaged {
            path: self.path.clone(),
            reason,
        }
    }
}

impl KeptGeneration {
    fn of(generation: &Generation) -> Self {
        let key = generation.signer.key_pem().filter(|_| !generation.operator);
        Self {
            stage: generation.stage,
            operator: generation.operator,
            since: seconds(generation.since),
            // Rounded up: a root must not go before what it signed.
            last_expiry: seconds(generation.last_expiry) + 1,
            certificates: certificate::to_pem(generation.signer.chain()),
            key,
            jwt_key: generation.jwt.pem().to_owned(),
        }
    }

    fn restore(self) -> Result<Generation, AuthorityError> {
        if self.key.is_none() && !self.operator {
            return Err(AuthorityError::Crypto("a key is missing".into()));
        }
        Ok(Generation {
            signer: Signer::from_pem(&self.certificates, self.key.as_deref())?,
            jwt: JwtKey::from_pem(&self.jwt_key)?,
            stage: self.stage,
            operator: self.operator,
            since: time(self.since),
            last_expiry: time(self.last_expiry),
        })
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

fn time(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.min(u64::from(u32::MAX)))
}
