//! Compiles the kernel programs (`bpf/`) with clang into one object that the crate embeds.

use std::{env, path::PathBuf, process::Command};

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
}
