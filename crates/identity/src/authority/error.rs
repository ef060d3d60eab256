//! What can be wrong with an authority's certificate, its state, or what it is asked.

use std::{io, path::PathBuf, time::Duration};

/// Why there is no authority, or why it cannot do what it is told.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file of the operator's, or its text, is no PEM of the right kind.
    #[error("the {what} cannot be read: {reason}")]
    Unreadable {
        /// Certificate or key.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The key is of a kind that the mesh's peers cannot check.
    #[error("the CA's key is {found}: use ECDSA on P-256 or P-384, or RSA")]
    KeyType {
        /// What it is.
        found: String,
    },
    /// Key and certificate do not belong together.
    #[error(
        "the key does not match the CA certificate `{subject}`: is the CA's certificate the first one in its file?"
    )]
    KeyMismatch {
        /// The certificate's subject.
        subject: String,
    },
    /// A certificate is not valid any more.
    #[error("the CA certificate `{subject}` expired on {at}")]
    Expired {
        /// Its subject.
        subject: String,
        /// When.
        at: String,
    },
    /// A certificate is not valid yet.
    #[error("the CA certificate `{subject}` is not valid before {at}: is the clock right?")]
    NotYetValid {
        /// Its subject.
        subject: String,
        /// When.
        at: String,
    },
    /// The certificate may not sign others.
    #[error("`{subject}` is no CA certificate: {reason}")]
    NotCa {
        /// Its subject.
        subject: String,
        /// What says so.
        reason: &'static str,
    },
    /// There are more certificates below one than it allows.
    #[error(
        "`{subject}` allows {allowed} CA certificates below it (pathlen), the file has {found}"
    )]
    PathLength {
        /// Its subject.
        subject: String,
        /// What it allows.
        allowed: u32,
        /// What there is.
        found: usize,
    },
    /// A certificate of the chain did not sign the one before it.
    #[error(
        "`{subject}` is not signed by `{issuer}`, which follows it: order the file from the CA's certificate to the root"
    )]
    BrokenChain {
        /// The one that is signed.
        subject: String,
        /// The one that follows it.
        issuer: String,
    },
    /// The chain does not end with a root.
    #[error(
        "the chain ends with `{subject}`, which is no root: append the certificates up to the self-signed one"
    )]
    NoRoot {
        /// The last certificate.
        subject: String,
    },
    /// Certificates that it signs would not be accepted.
    #[error("certificates signed by this CA are not accepted: {0}")]
    Unusable(String),
    /// A lifetime out of bounds.
    #[error("a certificate lifetime of {given:?} is out of bounds: between {least:?} and {most:?}")]
    Lifetime {
        /// What was asked for.
        given: Duration,
        /// The shortest.
        least: Duration,
        /// The longest.
        most: Duration,
    },
    /// The folder or file cannot be used.
    #[error("the CA's state in {} cannot be used: {reason}", path.display())]
    Files {
        /// Folder or file.
        path: PathBuf,
        /// The system's answer.
        reason: io::Error,
    },
    /// What is kept is not what was written.
    #[error("the CA's state in {} is damaged: {reason}. Restore it from a backup; or remove it, then no certificate of this mesh is trusted any more", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The folder is another mesh's.
    #[error("the CA's state in {} is of trust domain `{found}`, not `{expected}`", path.display())]
    OtherTrustDomain {
        /// The file.
        path: PathBuf,
        /// Of which it is.
        found: String,
        /// Of which it should be.
        expected: String,
    },
    /// The folder knows an operator's CA, whose key is not kept.
    #[error("the CA in {} was brought by its operator: start with --ca-cert and --ca-key, or remove the folder for a new CA", path.display())]
    OperatorMissing {
        /// The file.
        path: PathBuf,
    },
    /// A root is being rotated already.
    #[error("the last rotation of roots is still under way")]
    RotationUnderWay,
    /// Too many old roots are still trusted.
    #[error(
        "{0} old roots are still trusted: wait until the certificates that they signed have expired"
    )]
    TooManyRoots(usize),
    /// The operator's root is the operator's to rotate.
    #[error(
        "this root was brought by the operator: restart with another --ca-cert and --ca-key to rotate it"
    )]
    OperatorRoot,
    /// Cryptography failed.
    #[error("cannot make keys or certificates: {0}")]
    Crypto(String),
}

/// Why a certificate or token is not signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The request is no CSR.
    #[error("the certificate request cannot be read: {0}")]
    Malformed(String),
    /// Its key is not what the mesh uses.
    #[error("the certificate request's key is not ECDSA on P-256")]
    KeyType,
    /// Its signature is not its key's.
    #[error("the certificate request is not signed by its own key")]
    Signature,
    /// It asks for another name.
    #[error("the certificate request asks for {asked}, not for `{id}` alone")]
    OtherName {
        /// What its subject alternative names say.
        asked: String,
        /// What it is to be signed for.
        id: String,
    },
    /// The audience of a token.
    #[error("a token needs 1 to {most} audiences of 1 to {longest} bytes")]
    Audience {
        /// How many.
        most: usize,
        /// How long.
        longest: usize,
    },
    /// Another trust domain's.
    #[error("`{id}` is not of trust domain `{trust_domain}`")]
    OtherTrustDomain {
        /// Whose.
        id: String,
        /// Ours.
        trust_domain: String,
    },
    /// The authority's own certificate is at its end.
    #[error("the CA's own certificate is not valid now")]
    AuthorityExpired,
    /// Ours, not the caller's fault.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

impl SignError {
    /// Whether asking for something else would help.
    #[must_use]
    pub fn is_callers_fault(&self) -> bool {
        !matches!(self, Self::AuthorityExpired | Self::Authority(_))
    }
}

impl AuthorityError {
    pub(super) fn crypto(error: impl std::fmt::Display) -> Self {
        Self::Crypto(error.to_string())
    }
}
