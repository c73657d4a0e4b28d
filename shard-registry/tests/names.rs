//! What a model is called and who stands for it: ids, names that stay where they were pinned, signatures, and
//! files that a cache calls by links.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod support;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use shard_registry::{AliasName, ImportError, Store, StoreError};
use support::Model;
use swarm_proto::{Hash, ModelId, ModelSignature, Peer};

fn place() -> (tempfile::TempDir, PathBuf, Store) {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().canonicalize().unwrap();
    let store = Store::open(&dir.join("store")).unwrap();
    (temp, dir, store)
}

/// A model's file, with one byte of its weights turned.
fn file(dir: &Path, name: &str, turned: bool) -> PathBuf {
    let path = dir.join(name);
    Model::dense(2).write(&path);
    if turned {
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.len() - 100;
        bytes[at] ^= 1;
        fs::write(&path, bytes).unwrap();
    }
    path
}

fn import(store: &Store, path: &Path, name: &str) -> Result<ModelId, ImportError> {
    let name = name.parse::<AliasName>().unwrap();
    let imported = store.import(path, Some(&name), &mut |_| {});
    imported.map(|imported| imported.id)
}

#[test]
fn two_files_that_differ_in_one_byte_are_two_models() {
    let (_temp, dir, store) = place();
    let one = import(&store, &file(&dir, "one.gguf", false), "one").unwrap();
    let same = import(&store, &file(&dir, "same.gguf", false), "same").unwrap();
    let other = import(&store, &file(&dir, "other.gguf", true), "other").unwrap();
    assert_eq!(one, same, "what a file is called is no part of it");
    assert_ne!(one, other);
    assert_eq!(store.models().0.len(), 2);
}

#[test]
fn a_pinned_name_is_not_moved_until_its_owner_says_so() {
    let (_temp, dir, store) = place();
    let name: AliasName = "mine".parse().unwrap();
    let (right, wrong) = (
        file(&dir, "right.gguf", false),
        file(&dir, "wrong.gguf", true),
    );
    let id = import(&store, &right, "mine").unwrap();
    store.pin(&name, id, false).unwrap();
    assert_eq!(
        (store.alias(&name), store.pinned(&name)),
        (Some(id), Some(id))
    );
    let error = import(&store, &wrong, "mine").unwrap_err();
    assert!(
        matches!(error, ImportError::Store(StoreError::Pinned { .. })),
        "{error}"
    );
    assert_eq!(store.models().0.len(), 1, "nothing is stored of it");
    assert!(store.set_alias(&name, ModelId(Hash([1; 32]))).is_err());
    // The same model again is no move, and the pin stays.
    assert_eq!(import(&store, &right, "mine").unwrap(), id);
    assert_eq!(store.pinned(&name), Some(id));
    let other = import(&store, &wrong, "other").unwrap();
    assert!(store.pin(&name, other, false).is_err());
    store.pin(&name, other, true).unwrap();
    assert_eq!(
        (store.alias(&name), store.pinned(&name)),
        (Some(other), Some(other))
    );
    assert_eq!(store.aliases().1, [], "a pinned alias is an alias");
    assert_eq!(store.unpin(&name).unwrap(), Some(other));
    assert_eq!(store.unpin(&name).unwrap(), None);
    assert_eq!(store.alias(&name), Some(other));
    assert_eq!(import(&store, &right, "mine").unwrap(), id);
    // Before the model is here.
    let later: AliasName = "later".parse().unwrap();
    store.pin(&later, other, false).unwrap();
    assert!(import(&store, &right, "later").is_err());
    assert_eq!(import(&store, &wrong, "later").unwrap(), other);
}

#[test]
fn only_right_signatures_are_kept_and_shown() {
    let (_temp, dir, store) = place();
    let id = import(&store, &file(&dir, "m.gguf", false), "m").unwrap();
    let other = import(&store, &file(&dir, "n.gguf", true), "n").unwrap();
    let signed = ModelSignature::sign(id, &[3; 32]);
    let path = store.add_signature(&signed).unwrap();
    let found = store.signatures(id);
    assert_eq!(found, (vec![signed.clone()], vec![]));
    assert_eq!(signed.publisher, Peer::of_secret(&[3; 32]));
    assert_eq!(store.signatures(other).0, []);
    let forged = ModelSignature {
        model: other,
        ..signed.clone()
    };
    assert!(store.add_signature(&forged).is_err());
    let unknown = ModelSignature::sign(ModelId(Hash([9; 32])), &[3; 32]);
    assert!(matches!(
        store.add_signature(&unknown),
        Err(StoreError::Missing { .. })
    ));
    // What others put there: of another model, forged, no text at all, endless.
    let folder = path.parent().unwrap();
    let of_other = ModelSignature::sign(other, &[4; 32]).to_string();
    for (name, text) in [
        ("a", of_other),
        (
            "b",
            ModelSignature {
                publisher: Peer::of_secret(&[5; 32]),
                ..signed.clone()
            }
            .to_string(),
        ),
        ("c", "\u{0}".into()),
        ("d", "x".repeat(10_000)),
    ] {
        fs::write(folder.join(name), text).unwrap();
    }
    let (signatures, problems) = store.signatures(id);
    assert_eq!((signatures, problems.len()), (vec![signed], 4));
}

#[test]
fn a_model_whose_files_are_links_is_read_under_their_names() {
    let (_temp, dir, store) = place();
    let (blobs, names) = (dir.join("blobs"), dir.join("snapshots/main"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&names).unwrap();
    Model::dense(2).write_split(&dir, "m", 2);
    for (no, blob) in [(1, "0a"), (2, "0b")] {
        let name = format!("m-0000{no}-of-00002.gguf");
        fs::rename(dir.join(&name), blobs.join(blob)).unwrap();
        symlink(format!("../../blobs/{blob}"), names.join(&name)).unwrap();
    }
    let first = names.join("m-00001-of-00002.gguf");
    let imported = store.import(&first, None, &mut |_| {}).unwrap();
    assert_eq!(imported.alias.as_str(), "m");
    assert_eq!(store.find_file(&first), Some(imported.id));
    let (models, _) = store.models();
    assert_eq!(
        models[0].files[0], first,
        "other programs find the second part by this name"
    );
    assert!(store.reader(imported.id).is_ok());
    fs::write(blobs.join("0b"), "another").unwrap();
    assert_eq!(
        store.find_file(&first),
        None,
        "what the link leads to is looked at"
    );
}
