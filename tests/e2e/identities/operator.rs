//! A CA that the operator brings: made by openssl, an intermediate with its chain.

use std::{fs, path::Path, process::Command};

use tempfile::TempDir;

use super::{Own, objects, two_nodes};
use crate::harness::{Mesh, Outcome};

const ROOT: &str = "
[req]
distinguished_name = name
x509_extensions = root
prompt = no
[name]
CN = The operator's root
[root]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign, cRLSign
[ca]
basicConstraints = critical, CA:true, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
[leaf]
basicConstraints = critical, CA:false
";

#[test]
fn an_operators_ca_signs() {
    let files = Files::make();
    let path = |name: &str| files.path(name);
    let (chain, key) = (path("chain.pem"), path("ca.key"));
    let mesh = two_nodes("operator", &["--ca-cert", &chain, "--ca-key", &key]);
    mesh.connect("alice", "web", 80).greeting();

    // What a workload gets leads to the operator's root, for anybody's eyes.
    let own: Own = mesh.identity("alice", &["own"]).hear();
    fs::write(path("leaf.pem"), &own.chain[0]).unwrap();
    fs::write(path("between.pem"), own.chain[1..].concat()).unwrap();
    let [root] = &own.roots[..] else {
        panic!("{own:#?}");
    };
    assert_eq!(
        root.trim(),
        fs::read_to_string(path("root.pem")).unwrap().trim()
    );
    let verified = files.openssl(&[
        "verify",
        "-CAfile",
        "root.pem",
        "-untrusted",
        "between.pem",
        "leaf.pem",
    ]);
    assert_eq!(verified.stdout, "leaf.pem: OK\n");

    let refused = mesh.run("certs", &["rotate-root"]);
    assert_ne!(refused.code, 0, "{refused:#?}");
    assert!(refused.stderr.contains("--ca-cert"), "{refused:#?}");
}

#[test]
fn a_ca_that_is_of_no_use_is_said() {
    let files = Files::make();
    let mesh = Mesh::prepare("bad-ca", &[("objects.yaml", &objects())]);
    let attempts = [
        ("chain.pem", "other.key", "does not match"),
        ("ca.pem", "ca.key", "which is no root"),
        ("leaf.pem", "leaf.key", "is no CA certificate"),
        ("nothing.pem", "ca.key", "nothing.pem"),
        ("ca.key", "ca.key", "cannot be read"),
    ];
    for (certificate, key, said) in attempts {
        let arguments = [
            mesh.folder().to_str().unwrap(),
            "--detach",
            "--ca-cert",
            &files.path(certificate),
            "--ca-key",
            &files.path(key),
        ];
        let outcome = mesh.run("up", &arguments);
        assert_ne!(outcome.code, 0, "{certificate} {key}: {outcome:#?}");
        assert!(
            outcome.stderr.contains(said),
            "{certificate} {key}: {outcome:#?}"
        );
    }
    // It is the same mesh that starts with a CA that is one.
    mesh.up(&[
        "--ca-cert",
        &files.path("chain.pem"),
        "--ca-key",
        &files.path("ca.key"),
    ]);
}

/// A root, an intermediate `ca` with its `chain`, a certificate that is no CA's, and a key of something else.
struct Files(TempDir);

impl Files {
    fn make() -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        fs::write(files.path("openssl.cnf"), ROOT).unwrap();
        for name in ["root", "ca", "leaf", "other"] {
            let key = format!("{name}.key");
            files.openssl(&[
                "genpkey",
                "-algorithm",
                "EC",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-out",
                &key,
            ]);
        }
        files.openssl(&[
            "req",
            "-x509",
            "-config",
            "openssl.cnf",
            "-key",
            "root.key",
            "-days",
            "30",
            "-out",
            "root.pem",
        ]);
        for (name, signer) in [("ca", "root"), ("leaf", "root")] {
            let [key, request, certificate] =
                ["key", "csr", "pem"].map(|kind| format!("{name}.{kind}"));
            let [signer, signer_key] = ["pem", "key"].map(|kind| format!("{signer}.{kind}"));
            let subject = format!("/CN=The operator's {name}");
            files.openssl(&[
                "req",
                "-new",
                "-config",
                "openssl.cnf",
                "-key",
                &key,
                "-subj",
                &subject,
                "-out",
                &request,
            ]);
            files.openssl(&[
                "x509",
                "-req",
                "-in",
                &request,
                "-CA",
                &signer,
                "-CAkey",
                &signer_key,
                "-CAcreateserial",
                "-days",
                "20",
                "-extfile",
                "openssl.cnf",
                "-extensions",
                name,
                "-out",
                &certificate,
            ]);
        }
        let chain =
            ["ca.pem", "root.pem"].map(|name| fs::read_to_string(files.path(name)).unwrap());
        fs::write(files.path("chain.pem"), chain.concat()).unwrap();
        files
    }

    fn path(&self, name: &str) -> String {
        self.folder().join(name).to_str().unwrap().to_owned()
    }

    fn folder(&self) -> &Path {
        self.0.path()
    }

    #[track_caller]
    fn openssl(&self, arguments: &[&str]) -> Outcome {
        let mut command = Command::new("openssl");
        Outcome::of(command.args(arguments).current_dir(self.folder())).success()
    }
}
