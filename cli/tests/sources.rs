//! Models from a hub and from an address through the real binary, then names and signatures of what came.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that cannot go on says where

#[path = "../../download/tests/support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use support::{COMMIT, World};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf")
}

/// A hub with the demo model.
fn world() -> World {
    World::new(&[("tiny-F16.gguf", std::fs::read(demo()).unwrap())])
}

/// The binary with the world's hub and cache, and nothing of the caller's.
fn shoal(world: &World, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
    for (name, _) in std::env::vars() {
        if name.starts_with("SHOAL_") || name.starts_with("HF_") {
            command.env_remove(name);
        }
    }
    let home = world.dir.path();
    let output = command
        .args(args)
        .env("SHOAL_HOME", home)
        .env("HOME", home)
        .env("XDG_CONFIG_HOME", home.join("config"))
        .env("XDG_CACHE_HOME", home.join("cache"))
        .env("HF_ENDPOINT", &world.hub.address)
        .stdin(Stdio::null())
        .output();
    output.unwrap()
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text)
        .unwrap_or_else(|e| panic!("{e}: {text} {}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn a_model_is_imported_from_the_hub_and_from_an_address_as_from_a_file() {
    let world = world();
    let file = demo();
    let local = json(&shoal(
        &world,
        &["import", file.to_str().unwrap(), "--json"],
    ));
    let hub = json(&shoal(
        &world,
        &["import", "hf:owner/repo/tiny-F16.gguf", "--json"],
    ));
    assert_eq!(hub["model"], local["model"]);
    assert_eq!(hub["name"], "tiny-F16");
    let tagged = shoal(
        &world,
        &["import", "hf:owner/repo:F16", "--name", "other", "--json"],
    );
    assert_eq!(json(&tagged)["name"], "other");
    let address = format!("{}/store/tiny-F16.gguf", world.store.address);
    let web = json(&shoal(
        &world,
        &["import", &address, "--name", "web", "--json"],
    ));
    assert_eq!(web["model"], local["model"]);
    // It lies in the hub's own cache, under the name it has there.
    let snapshot =
        format!("cache/huggingface/hub/models--owner--repo/snapshots/{COMMIT}/tiny-F16.gguf");
    assert!(world.dir.path().join(&snapshot).exists());
    let bodies = world.fetched().len();
    assert_eq!(bodies, 2, "once from the hub, once from the address");
    let run = shoal(
        &world,
        &[
            "run", "--local", "tiny-F16", "--raw", "-n", "2", "--temp", "0", "Once",
        ],
    );
    assert!(
        run.status.success(),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
}

#[test]
fn what_cannot_be_had_says_what_to_try() {
    let world = world();
    let said = |args: &[&str], code: i32| {
        let output = shoal(&world, args);
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let missing = said(&["import", "hf:owner/repo/none.gguf"], 1);
    assert!(
        missing.contains("its models are tiny-F16.gguf"),
        "{missing}"
    );
    assert!(
        missing.contains("try: hf:owner/repo/tiny-F16.gguf"),
        "{missing}"
    );
    let usage = said(&["import", "hf:owner"], 2);
    assert!(usage.contains("hf:OWNER/REPO"), "{usage}");
    let insecure = said(&["import", "http://192.0.2.1/m.gguf"], 1);
    assert!(insecure.contains("only https"), "{insecure}");
    world.hub.plan().token = Some("hf_x".into());
    world.hub.plan().refusal = Some((401, "GatedRepo"));
    let gated = said(&["import", "hf:owner/repo:F16"], 1);
    assert!(
        gated.contains("accept the licence at") && gated.contains("HF_TOKEN"),
        "{gated}"
    );
}

#[test]
fn models_are_signed_verified_and_pinned() {
    let world = world();
    let file = demo();
    let model = json(&shoal(
        &world,
        &["import", file.to_str().unwrap(), "--name", "mine", "--json"],
    ));
    let signed = json(&shoal(&world, &["sign", "mine", "--json"]));
    let publisher = signed["publisher"].as_str().unwrap();
    let verify =
        |more: &[&str]| shoal(&world, &[&["verify", "mine", "--publisher"], more].concat());
    assert!(verify(&[publisher]).status.success());
    let stranger = swarm_proto::Peer([7; 32]).to_string();
    let refused = verify(&[&stranger]);
    assert_eq!(refused.status.code(), Some(1), "nobody else signed");
    // Somebody else's machine: the signature comes as a file.
    let other = self::world();
    let file_arg = file.to_str().unwrap();
    assert!(
        shoal(&other, &["import", file_arg, "--name", "mine"])
            .status
            .success()
    );
    let sent = signed["file"].as_str().unwrap();
    let check = ["verify", "mine", "--publisher", publisher];
    assert_eq!(shoal(&other, &check).status.code(), Some(1));
    let with_file = [&check[..], &["--signature", sent, "--json"]].concat();
    assert_eq!(json(&shoal(&other, &with_file))["signed"], true);
    assert!(shoal(&other, &check).status.success(), "it is kept");
    let inspected = json(&shoal(&other, &["inspect", "mine", "--json"]));
    assert_eq!(inspected["signed_by"][0], publisher);
    // A pinned name is refused to another model.
    let id = model["model"].as_str().unwrap();
    assert!(shoal(&world, &["pin", "mine", &id[..12]]).status.success());
    let changed = world.dir.path().join("changed.gguf");
    let mut bytes = std::fs::read(&file).unwrap();
    let at = bytes.len() - 64;
    bytes[at] ^= 1;
    std::fs::write(&changed, bytes).unwrap();
    let changed = changed.to_str().unwrap();
    let refused = shoal(&world, &["import", changed, "--name", "mine"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(
        said.contains("is pinned to") && said.contains("--remove"),
        "{said}"
    );
    assert_eq!(
        shoal(&world, &["pin", "mine", changed]).status.code(),
        Some(1)
    );
    let moved = json(&shoal(
        &world,
        &["pin", "mine", changed, "--force", "--json"],
    ));
    assert_ne!(moved["model"], id);
    let listed = json(&shoal(&world, &["models", "--offline", "--json"]));
    let pinned = listed["local"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|m| m["pinned"][0] == "mine");
    assert_eq!(pinned.count(), 1, "{listed}");
    assert!(shoal(&world, &["pin", "mine", "--remove"]).status.success());
}
