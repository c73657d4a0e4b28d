//! A cold start: one node has the model and little uplink, the others nothing; who fetched what, from whom.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::{PATIENCE, launch};
use tokio::time::timeout;

#[tokio::test]
async fn one_seed_with_little_uplink_fills_a_swarm_and_nothing_is_fetched_twice() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let args = "--cold --nodes 6 --upload-limit 2M -n 24 --report report.json";
    let args: Vec<&str> = args.split(' ').collect();
    let output = launch(folder.path(), &args)?.wait_with_output();
    let output = timeout(PATIENCE, output).await??;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{}: {said}{error}", output.status);

    let report: Value = serde_json::from_slice(&std::fs::read(folder.path().join("report.json"))?)?;
    ensure!(report["same_as_whole"] == true, "{report}");
    ensure!(report["fetched_twice"] == serde_json::json!([]), "{report}");
    ensure!(report["seed_upload_bytes_s_max"] == 2 << 20, "{report}");
    let copies = report["seed_copies"].as_f64().context("no copies")?;
    ensure!((0.9..3.0).contains(&copies), "{report}");
    let s = |milestone: &str| report[milestone].as_f64().unwrap_or(f64::NAN);
    ensure!(
        0.0 < s("first_layer_s") && s("first_layer_s") < s("covered_s"),
        "one after the other: {report}"
    );
    ensure!(s("covered_s") <= s("complete_s"), "{report}");
    let traffic = report["traffic"].as_array().context("no traffic")?;
    ensure!(
        traffic.len() == 6 && traffic[0]["fetched_bytes"] == 0,
        "{report}"
    );
    let fetched = |node: &Value| node["fetched_bytes"].as_u64();
    ensure!(
        traffic[1..].iter().all(|node| fetched(node) > Some(0)),
        "{report}"
    );
    // The seed is not asked: it is paused by then.
    let route = report["route_nodes"].as_array().context("no route")?;
    ensure!(
        !route.is_empty() && route.iter().all(|node| *node != 1),
        "{report}"
    );
    Ok(())
}

#[tokio::test]
async fn a_cold_start_needs_somebody_who_fetches() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for args in [["--cold", "--nodes", "1"], ["--cold", "--chaos", "kill"]] {
        let output = launch(folder.path(), &args)?.wait_with_output();
        let output = timeout(PATIENCE, output).await??;
        ensure!(
            output.status.code() == Some(2),
            "{args:?}: {}",
            output.status
        );
    }
    Ok(())
}
