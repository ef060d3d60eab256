//! `direct-scale` as a whole, small: a real agent with real workloads gives every figure, and nothing is left of it.

#![allow(
    clippy::unwrap_used,
    reason = "clippy allows it in tests, but not in the helpers of integration tests"
)]

use std::{path::Path, process::Command};

use serde_json::Value;

#[test]
fn every_figure_is_there_and_nothing_is_left() {
    let mesh = format!("test-scale-{}", std::process::id());
    let output = Command::new(env!("CARGO_BIN_EXE_heddle-bench"))
        .args(["direct-scale", "--quick", "-o", "json", "--mesh", &mesh])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let figures: Value = serde_json::from_slice(&output.stdout).unwrap();
    let paths = figures["paths"].as_array().unwrap();
    assert_eq!(paths.len(), 6);
    for path in paths {
        let medians = path["medians"].as_array().unwrap();
        assert_eq!(medians.len(), 2, "{path}");
        assert!(
            medians.iter().all(|median| median.as_f64().unwrap() > 0.0),
            "{path}"
        );
    }
    let changes = figures["changes"].as_array().unwrap();
    let timed = |what: &str| {
        changes.iter().any(|change| {
            change["what"].as_str().unwrap().contains(what)
                && change["median_ms"].as_f64().unwrap() > 0.0
        })
    };
    for what in [
        "services with a policy each",
        "500 endpoints at once",
        "one endpoint added to 500",
        "one endpoint taken from 10",
        "one weight changed",
        "one policy of a workload",
        "workloads known to both sides",
        "a policy of 8 workloads",
    ] {
        assert!(timed(what), "{what} is not among {changes:?}");
    }
    let memory = &figures["memory"][0];
    assert!(memory["agent_bytes"].as_u64().unwrap() > 0, "{memory}");
    assert!(memory["maps_bytes"].as_u64().unwrap() > 0, "{memory}");

    assert!(!Path::new("/run/heddle").join(&mesh).exists());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&mesh), "{mounts}");
    let cgroups = mounts
        .lines()
        .filter(|line| line.contains(" - cgroup2 "))
        .filter_map(|line| line.split(' ').nth(4));
    for cgroup in cgroups {
        assert!(
            !Path::new(cgroup).join(format!("heddle.{mesh}")).exists(),
            "{cgroup}"
        );
    }
}
