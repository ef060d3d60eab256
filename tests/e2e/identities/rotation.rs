//! Certificates that live for seconds, and a root that is replaced, while requests cross the nodes all the time.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::{Own, two_nodes};
use crate::harness::until;

/// Lifetime of certificates in the test, and how often they must have been replaced.
const LIFETIME: &str = "4s";
const TIMES: usize = 4;
const PATIENCE: Duration = Duration::from_secs(40);
/// A root signs ten seconds after it was announced, and the old one goes some lifetimes later.
const ROOT_PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn certificates_and_roots_are_replaced_under_load() {
    let mesh = two_nodes("rotation", &["--cert-lifetime", LIFETIME]);
    let load = mesh.request_loop("alice", "web", 80);
    let mut of_alice = mesh.identity("alice", &["follow"]);
    let first: Own = of_alice.hear();

    let mut serials = [BTreeSet::new(), BTreeSet::new()];
    until("certificates are replaced", PATIENCE, || {
        for (seen, account) in serials.iter_mut().zip(["shop/alice", "shop/web"]) {
            // None while there is no certificate yet.
            seen.extend(mesh.serial(account));
        }
        let enough = serials.iter().all(|seen| seen.len() > TIMES);
        enough.then_some(()).ok_or_else(|| format!("{serials:?}"))
    });

    mesh.run("certs", &["rotate-root"]).success();
    let again = mesh.run("certs", &["rotate-root"]);
    assert_ne!(again.code, 0, "{again:#?}");
    // What alice is told, step by step: both roots, then the new one alone.
    let mut steps = vec![first.roots.clone()];
    let until = Instant::now() + ROOT_PATIENCE;
    while steps.len() < 3 {
        let own: Own = of_alice.hear();
        if steps.last() != Some(&own.roots) {
            steps.push(own.roots);
        }
        assert!(Instant::now() < until, "{steps:#?}");
    }
    let counts: Vec<usize> = steps.iter().map(Vec::len).collect();
    assert_eq!(counts, [1, 2, 1], "{steps:#?}");
    assert!(steps[1].contains(&steps[0][0]) && steps[1].contains(&steps[2][0]));
    assert_ne!(steps[0], steps[2]);

    let report = load.finish();
    eprintln!("{} requests", report.total);
    report.all_succeeded();
}
