//! The keeper's folder: the bundle, and one file per identity with key and certificate, mode 0600.
//!
//! All of it can be had again from the authority: what cannot be read is passed over, with a warning.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, pem::PemObject as _};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    SpiffeId, Svid, TrustBundle,
    certificate::{self, encode, from_pem, to_pem},
    files,
};

const BUNDLE: &str = "bundle.json";
const SVID_PREFIX: &str = "svid-";

#[derive(Debug)]
pub(super) struct State {
    folder: PathBuf,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct KeptBundle {
    trust_domain: String,
    roots: String,
    jwt_keys: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct KeptSvid {
    certificates: String,
    key: String,
}

impl State {
    /// Makes the folder, and removes from it what has expired.
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        files::private_folder(folder)?;
        let state = Self {
            folder: folder.to_owned(),
        };
        state.remove_expired(SystemTime::now())?;
        Ok(state)
    }

    /// What was trusted last, and `first`.
    pub(super) fn load_bundle(
        &self,
        trust_domain: &str,
        first: Vec<CertificateDer<'static>>,
    ) -> TrustBundle {
        let kept = self.read::<KeptBundle>(&self.folder.join(BUNDLE));
        let kept = kept.filter(|kept| kept.trust_domain == trust_domain);
        let mut bundle = TrustBundle {
            trust_domain: trust_domain.to_owned(),
            roots: first,
            jwt_keys: r#"{"keys":[]}"#.to_owned(),
        };
        if let Some(kept) = kept {
            bundle.jwt_keys = kept.jwt_keys;
            for root in from_pem(&kept.roots).unwrap_or_default() {
                if !bundle.roots.contains(&root) {
                    bundle.roots.push(root);
                }
            }
        }
        bundle
    }

    pub(super) fn save_bundle(&self, bundle: &TrustBundle) {
        let kept = KeptBundle {
            trust_domain: bundle.trust_domain.clone(),
            roots: to_pem(&bundle.roots),
            jwt_keys: bundle.jwt_keys.clone(),
        };
        self.write(&self.folder.join(BUNDLE), &kept);
    }

    /// The certificate that was kept, if it is this identity's, valid and trusted.
    pub(super) fn load_svid(
        &self,
        id: &SpiffeId,
        roots: &[CertificateDer<'static>],
        now: SystemTime,
    ) -> Option<Svid> {
        let path = self.svid_path(id);
        let svid = parse(&self.read::<KeptSvid>(&path)?)?;
        if svid.id != *id {
            return None;
        }
        match certificate::verify(&svid.chain, roots, now) {
            Ok(()) => Some(svid),
            Err(error) => {
                tracing::info!(identity = %id, %error, "the certificate that was kept is of no use any more");
                None
            }
        }
    }

    pub(super) fn save_svid(&self, svid: &Svid) {
        let kept = KeptSvid {
            certificates: to_pem(&svid.chain),
            key: encode("PRIVATE KEY", svid.key.secret_pkcs8_der()),
        };
        self.write(&self.svid_path(&svid.id), &kept);
    }

    pub(super) fn remove_svid(&self, id: &SpiffeId) {
        let path = self.svid_path(id);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %path.display(), "the key of an identity that left cannot be removed");
        }
    }

    fn remove_expired(&self, now: SystemTime) -> io::Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if !name.starts_with(SVID_PREFIX) {
                continue;
            }
            let svid = self.read::<KeptSvid>(&path).and_then(|kept| parse(&kept));
            if svid.is_none_or(|svid| svid.not_after <= now) {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    fn svid_path(&self, id: &SpiffeId) -> PathBuf {
        let name: String = Sha256::digest(id.as_str())
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        self.folder.join(format!("{SVID_PREFIX}{name}.json"))
    }

    fn read<T: for<'a> Deserialize<'a>>(&self, path: &Path) -> Option<T> {
        let content = match files::read(path) {
            Ok(content) => content?,
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "cannot be read: it is fetched anew");
                return None;
            }
        };
        serde_json::from_slice(&content)
            .inspect_err(|error| {
                tracing::warn!(%error, path = %path.display(), "is damaged: it is fetched anew");
            })
            .ok()
    }

    /// What cannot be kept is still used: the node works, and a restart must ask the authority.
    fn write<T: Serialize>(&self, path: &Path, value: &T) {
        let written = serde_json::to_vec(value)
            .map_err(io::Error::other)
            .and_then(|content| files::write(path, &content));
        if let Err(error) = written {
            tracing::warn!(%error, path = %path.display(), "cannot be kept: a restart of the agent will need the authority");
        }
    }
}

fn parse(kept: &KeptSvid) -> Option<Svid> {
    let chain = from_pem(&kept.certificates).ok()?;
    let key = PrivatePkcs8KeyDer::from_pem_slice(kept.key.as_bytes()).ok()?;
    Svid::new(chain, key).ok()
}
