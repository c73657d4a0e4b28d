//! The measurements that the README names run, and print what a script would read. Their figures are
//! not looked at: a busy machine would fail them.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::process::{Command, Stdio};

use serde_json::Value;
fn bench(args: &[&str]) -> Value {
    let home = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_shoal"))
        .arg("bench")
        .args(args)
        .arg("--json")
        .env("SHOAL_HOME", home.path())
        .env("XDG_CONFIG_HOME", home.path().join("config"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn every_measurement_runs() {
    let decode = bench(&["decode", "--tokens", "4", "--rounds", "1"]);
    assert_eq!(decode["same_tokens"], true, "{decode}");
    let pipeline = bench(&["pipeline", "--tokens", "4", "--rounds", "1"]);
    assert_eq!(pipeline["same_tokens"], true, "{pipeline}");
    let standby = bench(&["standby", "--tokens", "40", "--rounds", "1"]);
    assert_eq!(standby["same_tokens"], true, "{standby}");
    assert_eq!(standby["standbys"], 2, "{standby}");
    let hops = bench(&["hops", "--steps", "10"]);
    assert!(hops["overhead_us_per_hop"]["p50"].is_number(), "{hops}");

    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.txt");
    let line = "The boat lay at the quay, and nobody on board said a word about the weather.\n";
    std::fs::write(&text, line.repeat(20)).unwrap();
    let text = text.to_str().unwrap();
    let wire = bench(&["wire", "--text", text, "--ctx", "64", "--windows", "2"]);
    let of = |i: usize| wire["wires"][i]["perplexity"].as_f64().unwrap();
    assert!(of(0) > 1.0 && (of(2) / of(0) - 1.0).abs() < 0.1, "{wire}");
}
