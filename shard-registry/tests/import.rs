//! A model from its files into the store and back out, and everything that can go wrong between.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod support;

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use gguf::TensorType;
use shard_registry::{Imported, Manifest, Resolved, ShardKind, Store};
use support::Model;
use swarm_proto::ModelId;

/// The folder lives as long as the first value.
fn place() -> (tempfile::TempDir, PathBuf, Store) {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().canonicalize().unwrap();
    let store = Store::open(&dir.join("store")).unwrap();
    (temp, dir, store)
}

fn import(store: &Store, path: &Path) -> Imported {
    store.import(path, None, &mut |_| {}).unwrap()
}

fn import_error(store: &Store, path: &Path) -> String {
    store
        .import(path, None, &mut |_| {})
        .unwrap_err()
        .to_string()
}

/// Every tensor, read through the verified reader, is what was written.
fn check_tensors(store: &Store, id: ModelId, model: &Model) {
    let reader = store.reader(id).unwrap();
    let mut out = vec![1, 2, 3];
    for (info, bytes) in &model.tensors {
        reader.read_tensor(&info.name, &mut out).unwrap();
        assert!(&out == bytes, "{}", info.name);
    }
    // Backwards too: nothing depends on the order.
    for (info, bytes) in model.tensors.iter().rev() {
        reader.read_tensor(&info.name, &mut out).unwrap();
        assert!(&out == bytes, "{}", info.name);
    }
    let error = reader
        .read_tensor("blk.99.x", &mut out)
        .unwrap_err()
        .to_string();
    assert!(error.ends_with("has no tensor \"blk.99.x\""), "{error}");
}

#[test]
fn a_dense_model_there_and_back() {
    let (_temp, dir, store) = place();
    let model = Model::dense(3);
    let path = dir.join("tiny.gguf");
    model.write(&path);
    let mut last = None;
    let imported = store
        .import(&path, None, &mut |progress| last = Some(progress))
        .unwrap();
    let last = last.unwrap();
    assert_eq!(last.done, last.total, "progress reaches the end");
    assert_eq!(imported.alias.as_str(), "tiny");
    let manifest = store.manifest(imported.id).unwrap();
    assert_eq!(
        (manifest.n_layer, manifest.n_embd, manifest.n_vocab),
        (3, 32, 50)
    );
    assert_eq!(
        (manifest.arch.as_str(), manifest.name.as_str()),
        ("llama", "tiny")
    );
    assert_eq!(manifest.n_ctx_train, 128);
    let kinds: Vec<_> = manifest
        .shards
        .iter()
        .map(|shard| shard.kind.to_string())
        .collect();
    assert_eq!(
        kinds,
        [
            "metadata",
            "embedding",
            "layer 0",
            "layer 1",
            "layer 2",
            "head"
        ]
    );
    check_tensors(&store, imported.id, &model);

    // The shard's hash is that of its tensors, one after the other.
    let layer = manifest.shard(ShardKind::Layer(1)).unwrap();
    let names = [
        "rope_freqs.weight",
        "blk.1.attn_q.weight",
        "blk.1.ffn_down.weight",
    ];
    let bytes: Vec<u8> = names
        .iter()
        .flat_map(|name| model.bytes_of(name))
        .copied()
        .collect();
    assert_eq!(layer.id.0.0, *blake3::hash(&bytes).as_bytes());
    assert_eq!(manifest.layer_bytes(1), bytes.len() as u64);

    // Importing again changes nothing; a name is an alias.
    assert_eq!(import(&store, &path), imported);
    assert_eq!(store.find_file(&path), Some(imported.id));
    let other = store
        .import(&path, Some(&"other".parse().unwrap()), &mut |_| {})
        .unwrap();
    assert_eq!(other.id, imported.id);
    let (models, problems) = store.models();
    assert_eq!((models.len(), problems.len()), (1, 0));
    assert_eq!(models[0].aliases.len(), 2);
    assert_eq!(models[0].files, [path]);
}

#[test]
fn headers_come_out_as_they_went_in() {
    let (_temp, dir, store) = place();
    let model = Model::dense(2);
    model.write(&dir.join("tiny.gguf"));
    let id = import(&store, &dir.join("tiny.gguf")).id;
    let manifest = store.manifest(id).unwrap();
    let header = manifest.header().unwrap();
    assert_eq!(header.tensors.len(), model.tensors.len());
    assert!(
        header.get("tokenizer.ggml.tokens").is_none(),
        "large settings are in the metadata"
    );
    assert!(
        header.get("llama.attention.head_count").is_some(),
        "one number a layer stays"
    );
    let metadata = store.metadata(id).unwrap();
    let vocab = manifest.vocab_header(&metadata).unwrap();
    for (key, value) in &model.kv {
        assert_eq!(vocab.get(key), Some(value));
    }
    assert!(vocab.tensors.is_empty());
    assert!(
        manifest
            .vocab_header(b"other")
            .unwrap_err()
            .to_string()
            .contains("hash")
    );
    assert_eq!(
        store.metadata_shard(manifest.metadata().unwrap().id),
        Some(metadata.clone())
    );

    // A client's store, filled from the network.
    let client = Store::open(&dir.join("client")).unwrap();
    let bytes = store.manifest_bytes(id).unwrap();
    assert_eq!(client.put_fetched(&bytes, &metadata).unwrap(), id);
    assert_eq!(client.manifest(id).unwrap(), manifest);
    let error = client.reader(id).unwrap_err().to_string();
    assert!(
        error.contains("not on this machine") && error.contains("shoal import"),
        "{error}"
    );
    assert!(client.put_fetched(&bytes, b"x").is_err());
}

#[test]
fn tied_and_mixed_models() {
    let (_temp, dir, store) = place();
    let tied = Model::tied(2);
    tied.write(&dir.join("tied.gguf"));
    let id = import(&store, &dir.join("tied.gguf")).id;
    let manifest = store.manifest(id).unwrap();
    let embedding = tied.bytes_of("token_embd.weight").len() as u64;
    assert_eq!(
        manifest.bytes_of(ShardKind::Head),
        embedding + 32 * 4,
        "the head has its own claim to it"
    );
    check_tensors(&store, id, &tied);

    let moe = Model::moe(2, 4);
    moe.write(&dir.join("moe.gguf"));
    let id = import(&store, &dir.join("moe.gguf")).id;
    let manifest = store.manifest(id).unwrap();
    assert_eq!(manifest.n_expert, 4);
    assert_eq!(manifest.shards.len(), 3 + 2 * (1 + 4));
    check_tensors(&store, id, &moe);
    // An expert's shard is its slice of each tensor.
    let expert = manifest
        .shard(ShardKind::Expert {
            layer: 1,
            expert: 2,
        })
        .unwrap();
    let slices = ["gate", "up", "down"].map(|name| {
        let bytes = moe.bytes_of(&format!("blk.1.ffn_{name}_exps.weight"));
        bytes.chunks(bytes.len() / 4).nth(2).unwrap().to_vec()
    });
    assert_eq!(expert.id.0.0, *blake3::hash(&slices.concat()).as_bytes());
    check_experts(&store, id, &moe);
    // Replacing what an alias points at is said.
    let again = store.import(
        &dir.join("moe.gguf"),
        Some(&"tied".parse().unwrap()),
        &mut |_| {},
    );
    assert!(again.unwrap().replaced.is_some());
}

/// Every expert's part of every tensor of experts.
fn check_experts(store: &Store, id: ModelId, model: &Model) {
    let reader = store.reader(id).unwrap();
    let n_expert = usize::from(store.manifest(id).unwrap().n_expert);
    let mut out = vec![1];
    let mut parts = 0;
    for expert in 0..n_expert {
        for (info, bytes) in &model.tensors {
            if !info.name.contains("_exps.") {
                continue;
            }
            reader
                .read_expert(&info.name, expert as u16, &mut out)
                .unwrap();
            let part = bytes.chunks(bytes.len() / n_expert).nth(expert);
            assert!(Some(&out[..]) == part, "{} of {expert}", info.name);
            parts += 1;
        }
    }
    assert!(parts >= 3 * n_expert);
    for (name, expert) in [
        ("blk.1.ffn_up_exps.weight", n_expert as u16),
        ("blk.1.ffn_norm.weight", 0),
        ("blk.1.x", 0),
    ] {
        let none = reader.read_expert(name, expert, &mut out).unwrap_err();
        let expected = format!("has no tensor \"{name} of expert {expert}\"");
        assert!(none.to_string().ends_with(&expected), "{none}");
    }
}

/// What architectures have beside separate matrices: a merged gate and up, biases and scales.
#[test]
fn experts_have_all_their_tensors_in_one_shard() {
    let (_temp, dir, store) = place();
    let mut model = Model::moe(2, 4);
    for layer in 0..2 {
        let name = |of: &str| format!("blk.{layer}.ffn_{of}");
        model.tensor(&name("gate_up_exps.weight"), &[32, 32, 4], TensorType::Q8_0);
        model.tensor(&name("down_exps.bias"), &[32, 4], TensorType::F32);
        model.tensor(&name("down_exps.scale"), &[4], TensorType::F32);
        // These have four values too, and belong to the trunk.
        model.tensor(&name("gate_inp.bias"), &[4], TensorType::F32);
        model.tensor(
            &format!("blk.{layer}.exp_probs_b.bias"),
            &[4],
            TensorType::F32,
        );
    }
    model.write(&dir.join("all.gguf"));
    let id = import(&store, &dir.join("all.gguf")).id;
    check_tensors(&store, id, &model);
    check_experts(&store, id, &model);
    let manifest = store.manifest(id).unwrap();
    let kind = ShardKind::Expert {
        layer: 1,
        expert: 3,
    };
    let q8 = |rows: u64| rows * 34;
    let expected = 3 * q8(16) + q8(32) + 4 * 32 + 4;
    assert_eq!(manifest.bytes_of(kind), expected);
}

#[test]
fn several_files_are_one_model() {
    let (_temp, dir, store) = place();
    let model = Model::dense(4);
    model.write(&dir.join("whole.gguf"));
    let whole = import(&store, &dir.join("whole.gguf"));
    model.write_split(&dir, "parts", 3);
    let parts = import(&store, &dir.join("parts-00002-of-00003.gguf"));
    assert_eq!(parts.id, whole.id, "the same weights are the same model");
    assert_eq!(parts.alias.as_str(), "parts");
    check_tensors(&store, parts.id, &model);

    let second = dir.join("parts-00002-of-00003.gguf");
    let aside = dir.join("aside.gguf");
    fs::rename(&second, &aside).unwrap();
    let error = import_error(&store, &dir.join("parts-00001-of-00003.gguf"));
    assert!(error.contains("parts-00002-of-00003.gguf"), "{error}");
    fs::copy(dir.join("parts-00003-of-00003.gguf"), &second).unwrap();
    let error = import_error(&store, &dir.join("parts-00001-of-00003.gguf"));
    assert!(
        error.contains("it is file 3 of 3, by its name it is 2 of 3"),
        "{error}"
    );
    let error = import_error(&store, &aside);
    assert!(error.contains("NAME-00001-of-0000N.gguf"), "{error}");
}

/// After the import a file changes: named, with what to do; never used.
#[test]
fn a_file_is_identified_by_every_byte_of_it_and_nothing_is_stored() {
    let (_temp, dir, store) = place();
    let path = dir.join("m.gguf");
    Model::dense(3).write(&path);
    let before = shard_registry::identify(&path, &mut |_| {}).unwrap();
    assert!(store.models().0.is_empty());
    assert_eq!(import(&store, &path).id, before);
    let good = fs::read(&path).unwrap();
    // In the settings, in the tensor table, in the weights: padding aside there is nothing else.
    let places = ["general.architecture", "blk.1."].map(|name| {
        let found = good.windows(name.len()).position(|w| w == name.as_bytes());
        found.unwrap() + name.len() - 2
    });
    for at in places.into_iter().chain([good.len() - 40]) {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&path, &bad).unwrap();
        let now = shard_registry::identify(&path, &mut |_| {});
        assert_ne!(now.ok(), Some(before), "byte {at}");
    }
}

#[test]
fn files_that_changed() {
    let (_temp, dir, store) = place();
    let model = Model::dense(2);
    let path = dir.join("tiny.gguf");
    model.write(&path);
    let id = import(&store, &path).id;
    let good = fs::read(&path).unwrap();
    let find = |name: &str| {
        let bytes = model.bytes_of(name);
        good.windows(bytes.len())
            .position(|window| window == bytes)
            .unwrap()
    };
    let says = |error: String, words: &[&str]| {
        for word in words.iter().copied().chain(["tiny.gguf", "shoal import"]) {
            assert!(error.contains(word), "{error:?} does not say {word:?}");
        }
    };
    let mut out = Vec::new();

    // One bit, in layer 1 only.
    let at = find("blk.1.ffn_down.weight");
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[good[at] ^ 1], at as u64).unwrap();
    let reader = store.reader(id).unwrap();
    let error = reader
        .read_tensor("blk.1.attn_q.weight", &mut out)
        .unwrap_err();
    says(error.to_string(), &["layer 1", "damaged"]);
    assert!(out.is_empty(), "no byte of it comes out");
    reader.read_tensor("blk.0.attn_q.weight", &mut out).unwrap();
    assert_eq!(out, model.bytes_of("blk.0.attn_q.weight"));
    assert!(
        store.find_file(&path).is_none(),
        "a changed file is not taken by its name"
    );
    // Written back: the same model again.
    file.write_all_at(&[good[at]], at as u64).unwrap();
    check_tensors(&store, id, &model);

    // Cut short, while a reader has it open, and before.
    let reader = store.reader(id).unwrap();
    file.set_len(good.len() as u64 / 2).unwrap();
    let error = reader.read_tensor("output.weight", &mut out).unwrap_err();
    says(error.to_string(), &["head"]);
    says(
        store.reader(id).unwrap_err().to_string(),
        &["when it was imported"],
    );

    fs::remove_file(&path).unwrap();
    says(store.reader(id).unwrap_err().to_string(), &["No such file"]);
    fs::write(&path, &good).unwrap();
    check_tensors(&store, id, &model);
    // Imported again from another place: the model is read from there.
    let moved = dir.join("moved-tiny.gguf");
    fs::rename(&path, &moved).unwrap();
    assert_eq!(import(&store, &moved).id, id);
    check_tensors(&store, id, &model);
}

#[test]
fn files_that_are_no_models() {
    let (_temp, dir, store) = place();
    let path = dir.join("x.gguf");
    let fails = |model: &Model, why: &str| {
        model.write(&path);
        let error = import_error(&store, &path);
        assert!(error.contains(why), "{error:?} does not say {why:?}");
    };
    let mut model = Model::dense(2);
    model.set("llama.block_count", 3u32);
    fails(&model, "layer 2 has no tensors");
    model.set("llama.block_count", 1u32);
    fails(
        &model,
        "tensor blk.1.attn_q.weight belongs to no layer of a model that has 1",
    );
    model.set("llama.block_count", u32::MAX);
    fails(
        &model,
        "llama.block_count is 4294967295, 1 to 1024 are possible",
    );
    model.set("llama.block_count", 0u32);
    fails(&model, "llama.block_count is 0");
    let mut model = Model::dense(2);
    model.set("llama.embedding_length", 64u32);
    fails(
        &model,
        "token_embd.weight has the shape [32, 50], rows of 64 are declared",
    );
    let mut model = Model::dense(2);
    model.set("llama.expert_count", u32::MAX);
    fails(&model, "expert_count is 4294967295");
    let mut model = Model::dense(2);
    model.kv.remove(0);
    fails(&model, "no general.architecture");
    let mut model = Model::dense(2);
    model.tensors.remove(0);
    fails(&model, "no tensor token_embd.weight");
    let mut model = Model::dense(2);
    for i in 0..20 {
        model.tensor(&format!("shared.{i}"), &[1], gguf::TensorType::F32);
    }
    fails(&model, "tensors for every layer");

    fs::write(&path, b"GGUF").unwrap();
    assert!(import_error(&store, &path).contains("x.gguf"));
    fs::write(&path, b"not a model at all, but long enough to be read").unwrap();
    assert!(import_error(&store, &path).contains("x.gguf"));
    assert!(import_error(&store, &dir).contains("is not a file"));
    assert!(import_error(&store, &dir.join("none.gguf")).contains("none.gguf"));
    assert!(store.models().0.is_empty());
}

#[test]
fn names_and_what_they_resolve_to() {
    let (_temp, dir, store) = place();
    let unknown = store.resolve("demo").unwrap_err().to_string();
    assert!(unknown.contains("shoal import FILE.gguf"), "{unknown}");
    let path = dir.join("tiny.gguf");
    Model::dense(2).write(&path);
    let id = import(&store, &path).id;
    let text = id.to_string();
    for name in ["tiny", &text, &text[..6], &text.to_uppercase()[..20]] {
        assert_eq!(store.resolve(name), Ok(Resolved::Model(id)), "{name}");
    }
    let file = path.to_str().unwrap();
    assert_eq!(store.resolve(file), Ok(Resolved::File(path.clone())));
    let unknown = store.resolve(&text[..5]).unwrap_err().to_string();
    assert!(unknown.contains("known are tiny"), "{unknown}");
    for bad in ["", "../x", ".x", "a/b", "-x", &"x".repeat(65)] {
        assert!(bad.parse::<shard_registry::AliasName>().is_err(), "{bad:?}");
    }
}

/// Whatever lies in the store: reported, skipped, nothing lost beside it.
#[test]
fn torn_entries() {
    let (_temp, dir, store) = place();
    Model::dense(2).write(&dir.join("good.gguf"));
    Model::dense(3).write(&dir.join("bad.gguf"));
    let good = import(&store, &dir.join("good.gguf")).id;
    let bad = import(&store, &dir.join("bad.gguf")).id;
    let model = |file: &str| store.dir().join("models").join(bad.to_string()).join(file);
    let manifest = fs::read(model("manifest")).unwrap();

    fs::write(model("manifest"), &manifest[..manifest.len() / 2]).unwrap();
    fs::create_dir(store.dir().join("models/rubbish")).unwrap();
    fs::write(store.dir().join("aliases/torn"), b"12").unwrap();
    fs::write(store.dir().join("tmp/.tmpleft"), b"half").unwrap();
    let store = Store::open(store.dir()).unwrap();
    let (models, problems) = store.models();
    assert_eq!(
        models.iter().map(|model| model.id).collect::<Vec<_>>(),
        [good]
    );
    let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(problems.len(), 3, "{problems:#?}");
    assert!(problems.iter().all(|problem| problem.contains("skipped")));
    assert_eq!(store.resolve("good"), Ok(Resolved::Model(good)));
    assert!(
        store
            .manifest(bad)
            .unwrap_err()
            .to_string()
            .contains("its hash is not")
    );

    fs::write(model("manifest"), &manifest).unwrap();
    fs::write(model("sources.json"), b"{\"version\":1,").unwrap();
    assert!(
        store
            .reader(bad)
            .unwrap_err()
            .to_string()
            .contains("sources.json")
    );
    fs::write(model("metadata"), b"x").unwrap();
    assert!(
        store
            .metadata(bad)
            .unwrap_err()
            .to_string()
            .contains("metadata")
    );
    // Importing again mends it.
    import(&store, &dir.join("bad.gguf"));
    check_tensors(&store, bad, &Model::dense(3));
    assert!(store.metadata(bad).is_ok());
}

/// A source list that lies about where tensors are gives wrong bytes to the hash, not to the caller.
#[test]
fn a_source_list_that_lies() {
    let (_temp, dir, store) = place();
    let path = dir.join("tiny.gguf");
    Model::dense(2).write(&path);
    let id = import(&store, &path).id;
    let sources = store
        .dir()
        .join("models")
        .join(id.to_string())
        .join("sources.json");
    let text = fs::read_to_string(&sources).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["tensors"][2]["offset"] = 64.into();
    fs::write(&sources, json.to_string()).unwrap();
    let mut out = Vec::new();
    let reader = store.reader(id).unwrap();
    assert!(reader.read_tensor("blk.0.attn_q.weight", &mut out).is_err());
    json["tensors"][2]["offset"] = u64::MAX.into();
    fs::write(&sources, json.to_string()).unwrap();
    assert!(
        store
            .reader(id)
            .unwrap()
            .read_tensor("blk.0.attn_q.weight", &mut out)
            .is_err()
    );
    json["tensors"][2]["file"] = 7.into();
    fs::write(&sources, json.to_string()).unwrap();
    assert!(store.reader(id).is_err());
    json["tensors"] = serde_json::json!([]);
    fs::write(&sources, json.to_string()).unwrap();
    assert!(store.reader(id).is_err());
}

/// Every byte of a manifest changed, one at a time: refused, or an equally lawful other model.
#[test]
fn manifests_that_lie() {
    let (_temp, dir, store) = place();
    Model::moe(2, 2).write(&dir.join("tiny.gguf"));
    let id = import(&store, &dir.join("tiny.gguf")).id;
    let good = store.manifest_bytes(id).unwrap();
    assert_eq!(
        Manifest::decode_for(id, &good).unwrap().encode().unwrap(),
        good
    );
    for i in 0..good.len() {
        for change in [1, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[i] ^= change;
            assert!(Manifest::decode_for(id, &bytes).is_err(), "byte {i}");
            if let Ok(manifest) = Manifest::decode(&bytes) {
                manifest.check().unwrap();
                assert_eq!(manifest.encode().unwrap(), bytes);
            }
        }
    }
    for len in 0..good.len() {
        assert!(Manifest::decode(&good[..len]).is_err());
    }
    let newer = [&[2], &good[1..]].concat();
    assert!(
        Manifest::decode(&newer)
            .unwrap_err()
            .to_string()
            .contains("update shoal")
    );
}

const CHILD: &str = "SHOAL_TEST_IMPORT";

/// Not a test by itself: what the processes below run.
#[test]
fn child_import() {
    let Ok(args) = std::env::var(CHILD) else {
        return;
    };
    let (store, path) = args.split_once('|').unwrap();
    let store = Store::open(Path::new(store)).unwrap();
    loop {
        store.import(Path::new(path), None, &mut |_| {}).unwrap();
        if !path.ends_with("large.gguf") {
            return;
        }
    }
}

fn child(store: &Store, path: &Path) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_import"])
        .env(
            CHILD,
            format!("{}|{}", store.dir().display(), path.display()),
        )
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn many_processes_into_one_store() {
    let (_temp, dir, store) = place();
    let paths: Vec<_> = (1..4).map(|n| dir.join(format!("m{n}.gguf"))).collect();
    for (path, n) in paths.iter().zip(1..) {
        Model::dense(n).write(path);
    }
    let children: Vec<_> = (0..9).map(|i| child(&store, &paths[i % 3])).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let (models, problems) = store.models();
    assert_eq!((models.len(), problems.len()), (3, 0));
    for (path, n) in paths.iter().zip(1..) {
        let id = import(&store, path).id;
        check_tensors(&store, id, &Model::dense(n));
    }
}

/// Killed at many points of an import that runs again and again: the store stays usable.
#[test]
fn killed_in_the_middle() {
    let (_temp, dir, store) = place();
    Model::dense(1).write(&dir.join("small.gguf"));
    let small = import(&store, &dir.join("small.gguf")).id;
    let large = dir.join("large.gguf");
    Model::dense(40).write(&large);
    let begun = || {
        fs::read_dir(store.dir().join("tmp"))
            .unwrap()
            .next()
            .is_some()
    };
    for _ in 0..20 {
        let mut child = child(&store, &large);
        // Not before it writes: that is where a kill could hurt.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while !begun() && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let store = Store::open(store.dir()).unwrap();
        let (models, _) = store.models();
        assert!(models.iter().any(|model| model.id == small));
        for model in models {
            assert!(store.metadata(model.id).is_ok());
        }
        for left in fs::read_dir(store.dir().join("tmp")).unwrap() {
            fs::remove_file(left.unwrap().path()).unwrap();
        }
    }
    let id = import(&store, &large).id;
    check_tensors(&store, id, &Model::dense(40));
}
