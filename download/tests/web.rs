//! Files at plain addresses: resumed only while they are the same, kept apart when they changed, and fetched
//! over https or from this machine only.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod support;

use std::fs;

use download::DownloadError;
use support::{World, body};

/// A server with one plain file.
fn world(etag: &str) -> (World, String) {
    let world = World::new(&[]);
    let mut plan = world.store.plan();
    plan.bodies.insert("/d/m.gguf".into(), body(1, 300_000));
    plan.etag = etag.into();
    drop(plan);
    let address = format!("{}/d/m.gguf?key=secret", world.store.address);
    (world, address)
}

#[test]
fn a_plain_file_is_fetched_once_and_a_changed_one_lies_beside_it() {
    let (world, address) = world("\"one\"");
    let first = world.obtain(&address).unwrap();
    assert!(first.starts_with(world.dir.path().join("downloads")) && first.ends_with("m.gguf"));
    assert_eq!(world.obtain(&address).unwrap(), first);
    assert_eq!(world.fetched().len(), 1);
    let mut plan = world.store.plan();
    plan.bodies.insert("/d/m.gguf".into(), body(2, 300_000));
    plan.etag = "\"two\"".into();
    drop(plan);
    let second = world.obtain(&address).unwrap();
    assert_eq!(
        fs::read(first).unwrap(),
        body(1, 300_000),
        "what was imported stays"
    );
    assert_eq!(fs::read(second).unwrap(), body(2, 300_000));
}

#[test]
fn a_cut_plain_file_goes_on_only_while_it_is_the_same() {
    let (world, address) = world("\"one\"");
    world.store.plan().cuts = vec![100_000];
    let path = world.obtain(&address).unwrap();
    assert_eq!(fs::read(path).unwrap(), body(1, 300_000));
    let asked = world.fetched();
    assert_eq!(asked[1].range.as_deref(), Some("bytes=100000-"));
    assert_eq!(asked[1].if_range.as_deref(), Some("\"one\""));
}

#[test]
fn without_a_validator_nothing_old_is_gone_on_with() {
    let (world, address) = world("");
    world.store.plan().cuts = vec![100_000, 0, 0, 0, 0, 0];
    assert!(matches!(
        world.obtain(&address),
        Err(DownloadError::Cut { .. })
    ));
    world.fetched();
    let path = world.obtain(&address).unwrap();
    assert_eq!(fs::read(path).unwrap(), body(1, 300_000));
    assert_eq!(world.fetched()[0].range, None);
}

#[test]
fn without_tls_only_this_machine() {
    let (world, _) = world("");
    for address in ["http://192.0.2.1/m.gguf", "http://example.invalid/m.gguf"] {
        let error = world.obtain(address).unwrap_err();
        assert!(matches!(error, DownloadError::Insecure { .. }), "{error}");
    }
    // A redirect is an address like any other.
    world.store.plan().moved = Some("http://192.0.2.1/m.gguf".into());
    let error = world
        .obtain(&format!("{}/moved.gguf", world.store.address))
        .unwrap_err();
    assert!(matches!(error, DownloadError::Insecure { .. }), "{error}");
}

#[test]
fn what_cannot_be_had_is_said_without_the_key() {
    let (world, address) = world("");
    let missing = address.replace("m.gguf", "n.gguf");
    let error = world.obtain(&missing).unwrap_err();
    assert!(
        error.to_string().contains("404") && !error.to_string().contains("secret"),
        "{error}"
    );
    world.store.plan().no_length = true;
    let error = world.obtain(&address).unwrap_err();
    assert!(error.to_string().contains("how long"), "{error}");
}
