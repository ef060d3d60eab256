//! Ignoring signals, which neither std nor nix does without unsafe code.
#![allow(unsafe_code)] // sigaction(2) is unsafe because of what handlers may do; here there is none.

use std::io;

use nix::sys::signal::{SigHandler, Signal, signal};

/// The whole process ignores them from now on.
pub(super) fn ignore(signals: &[Signal]) -> io::Result<()> {
    for &one in signals {
        // SAFETY: no handler is installed, so no code of ours ever runs in one.
        unsafe { signal(one, SigHandler::SigIgn) }?;
    }
    Ok(())
}
