//! The claim of one `heddle up` on its mesh: the lock, a clean start, the guardian, a clean end.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};

use crate::{
    cleanup::{self, Report},
    error::{During, Error},
    guardian::Guardian,
    layout::{Layout, Lock},
};

/// The mesh is ours. Dropped without [`Claim::release`], as by a crash, the guardian cleans up.
#[derive(Debug)]
pub struct Claim {
    layout: Layout,
    lock: Lock,
    guardian: Guardian,
    /// The pins of all nodes, and with them the policy in force, live as long as this is open, even if someone
    /// unmounts the bpffs.
    bpf: Option<File>,
}

impl Claim {
    /// Takes the mesh: the lock, then what a killed predecessor left is removed, then the guardian starts, and
    /// last the run folder is made, with its tmpfs and its bpffs. `who` is shown to others who ask for the mesh.
    /// Blocks.
    ///
    /// # Errors
    /// [`Error::AlreadyUp`]; [`Error::NotClean`]; missing rights.
    pub fn take(layout: &Layout, who: &str, executable: &Path) -> Result<Self, Error> {
        let lock = Lock::take(layout, who)?;
        checked(layout, &cleanup::clean_mesh(&layout.remains()))?;
        let guardian = Guardian::start(executable, &layout.remains(), lock.path(), lock.share()?)
            .map_err(|error| Error::Container(error.to_string()))?;
        let mut claim = Self {
            layout: layout.clone(),
            lock,
            guardian,
            bpf: None,
        };
        claim.furnish()?;
        let bpf = layout.bpf_mount();
        claim.bpf = Some(File::open(&bpf).during(|| format!("open {}", bpf.display()))?);
        Ok(claim)
    }

    /// Removes everything of the mesh and gives the claim up. Blocks.
    ///
    /// # Errors
    /// [`Error::NotClean`]; the guardian then tries once more.
    pub fn release(self) -> Result<(), Error> {
        drop(self.bpf);
        checked(&self.layout, &cleanup::clean_mesh(&self.layout.remains()))?;
        self.guardian
            .finish()
            .map_err(|error| Error::Container(error.to_string()))?;
        self.lock.remove()
    }

    fn furnish(&self) -> Result<(), Error> {
        let run = self.layout.run_dir();
        create(run.to_path_buf())?;
        // Sockets in it lead to root's powers.
        fs::set_permissions(run, fs::Permissions::from_mode(0o700))
            .during(|| format!("protect {}", run.display()))?;
        let scratch = create(self.layout.scratch_mount())?;
        mount_own("tmpfs", &scratch, "mode=700")?;
        let bpf = create(self.layout.bpf_mount())?;
        mount_own("bpf", &bpf, "mode=700")
    }
}

/// Ends what a mesh has left: for `heddle down` where no `up` answers.
///
/// # Errors
/// [`Error::AlreadyUp`] if one does run; [`Error::NotClean`].
pub fn clean(layout: &Layout) -> Result<Report, Error> {
    let lock = Lock::take(layout, "heddle down")?;
    let report = cleanup::clean_mesh(&layout.remains());
    checked(layout, &report)?;
    lock.remove()?;
    Ok(report)
}

fn checked(layout: &Layout, report: &Report) -> Result<(), Error> {
    if report.errors.is_empty() {
        return Ok(());
    }
    let left: Vec<String> = report.errors.iter().map(ToString::to_string).collect();
    Err(Error::NotClean {
        mesh: layout.mesh().into(),
        left: left.join("; "),
    })
}

fn create(folder: PathBuf) -> Result<PathBuf, Error> {
    fs::create_dir_all(&folder).during(|| format!("create {}", folder.display()))?;
    Ok(folder)
}

fn mount_own(filesystem: &str, target: &Path, options: &str) -> Result<(), Error> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(
        Some(filesystem),
        target,
        Some(filesystem),
        flags,
        Some(options),
    )
    .during(|| format!("mount {filesystem} at {}", target.display()))
}
