//! Moves what is in maps of another size or layout into the maps that take their place, so that no connection
//! notices: policy tables before the programs see them, what programs write while they do.
//!
//! `maps` says which map is moved how. The steps, each of which may be the last one of an agent that dies:
//!
//! 1. new maps are made under `staging/`, policy tables are copied ([`fill`]); the caller brings them up to date;
//! 2. the new maps are published ([`publish`]): a later agent goes on with them;
//! 3. the links are switched one by one, readers before writers (`attach`);
//! 4. the rest is moved, and the earlier maps go ([`finish`]).

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd},
};

use crate::{
    KernelError, btf,
    maps::{Earlier, Keep, Place, SOCKETS_BEFORE},
    raw::{self, Existing},
    sys,
};

/// Copies policy tables into new maps.
pub(crate) fn fill(places: &[Place]) -> Result<(), KernelError> {
    for place in places {
        if let (Keep::Copied, Some(_), Some(earlier)) =
            (place.spec.keep, &place.publish, place.earlier.first())
        {
            copy(place, earlier, Existing::Replace)?;
        }
    }
    Ok(())
}

/// Puts the new maps' pins where the next agent finds them.
pub(crate) fn publish(places: &mut [Place]) -> Result<(), KernelError> {
    for place in places {
        if let (Keep::Cache | Keep::Lru, Some(earlier)) = (place.spec.keep, place.earlier.first()) {
            copy(place, earlier, Existing::Replace)?;
        }
        if let Some(to) = place.publish.take() {
            fs::rename(&place.path, &to).map_err(failed(place, "publish"))?;
            place.path = to;
        }
    }
    Ok(())
}

/// When no link runs an earlier program any more: moves the rest and drops the earlier maps, but for those that
/// sockets may still depend on.
pub(crate) fn finish(places: &mut [Place]) -> Result<(), KernelError> {
    for place in places {
        if let Keep::Cache | Keep::Lru | Keep::Handshakes = place.spec.keep {
            for earlier in &place.earlier {
                copy(place, earlier, Existing::Keep)?;
            }
        }
        let kept = match place.spec.keep {
            Keep::Sockets => SOCKETS_BEFORE.len(),
            _ => 0,
        };
        // The oldest first: should this be interrupted, those that are left are the newest.
        while place.earlier.len() > kept {
            if let Some(earlier) = place.earlier.last() {
                fs::remove_file(&earlier.path).map_err(failed(place, "drop the earlier"))?;
            }
            place.earlier.pop();
        }
    }
    Ok(())
}

/// Copies every entry that there is room for; what misses its entry is refused, and the agent says what is full.
fn copy(place: &Place, earlier: &Earlier, existing: Existing) -> Result<(), KernelError> {
    let Some(plans) = &earlier.plans else {
        return Ok(());
    };
    // A key that lost or gained a field may come to mean another thing; only policy tables are filled again.
    if !plans.same_keys && place.spec.keep != Keep::Copied {
        return Ok(());
    }
    let failed = |source| failed(place, "fill")(source);
    let to = sys::open_pin(&place.path).map_err(failed)?;
    copy_entries(to.as_fd(), earlier.map.as_fd(), plans, existing).map_err(failed)
}

fn copy_entries(
    to: BorrowedFd<'_>,
    from: BorrowedFd<'_>,
    plans: &crate::maps::Plans,
    existing: Existing,
) -> io::Result<()> {
    raw::for_each(from, |key, value| {
        let key = btf::convert(&plans.key, key);
        let value = btf::convert(&plans.value, value);
        raw::update(to, &key, &value, existing).map(drop)
    })
}

fn failed(place: &Place, action: &'static str) -> impl FnOnce(io::Error) -> KernelError {
    let map = place.spec.name;
    move |source| KernelError::Migration {
        map,
        action,
        source,
    }
}
