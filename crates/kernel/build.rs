//! Compiles the kernel programs (`bpf/`) with clang into one object that the crate embeds.

use std::{
    env, fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::PathBuf,
    process::Command,
};

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut clang = Command::new(env::var("CLANG").unwrap_or_else(|_| "clang".into()));
    clang.args(["-O2", "-g", "-target", "bpf", "-Wall", "-Werror"]);
    // Debian keeps <asm/types.h> below the machine's own include folder.
    for arch in ["x86_64-linux-gnu", "aarch64-linux-gnu"] {
        clang.arg(format!("-I/usr/include/{arch}"));
    }
    clang
        .args(["-c", "bpf/heddle.bpf.c", "-o"])
        .arg(out.join("heddle.bpf.o"));
    match clang.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("clang failed on bpf/heddle.bpf.c ({status}): see its messages above"),
        Err(error) => {
            panic!(
                "cannot run clang ({error}): install it, on Debian `apt install clang libbpf-dev`"
            )
        }
    }
    println!("cargo::rustc-env=HEDDLE_MAP_LAYOUT={:016x}", layout());
}

/// Names the map layout: objects with the same layout may share pinned maps.
fn layout() -> u64 {
    let mut hasher = DefaultHasher::new();
    for header in ["bpf/types.h", "bpf/maps.h"] {
        fs::read_to_string(header)
            .expect("the header is part of the crate")
            .hash(&mut hasher);
    }
    hasher.finish()
}
