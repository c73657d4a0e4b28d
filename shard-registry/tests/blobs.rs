//! Shards from one store to another, group by group, and everything that can go wrong between: wrong bytes, kills,
//! damaged files, a disk that is full or cannot be written.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod support;

use std::{
    fs::{self, OpenOptions},
    io::Cursor,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use gguf::TensorType;
use shard_registry::{
    Manifest, ShardEntry, ShardKind, Store,
    blobs::{
        BlobError, GiveError, OpenShard, Partial, Quota, TakeError, Taken, Worth, encoded_len,
    },
};
use support::Model;
use swarm_proto::{
    LayerRange, ModelId, ShardId,
    transfer::{GROUP_BYTES, groups_of},
};

/// A model with a layer of 40 and a half groups, imported; and a store that knows only what describes it.
struct Place {
    _temp: tempfile::TempDir,
    dir: PathBuf,
    model: Model,
    from: Store,
    to: Store,
    id: ModelId,
    manifest: Manifest,
}

fn place() -> Place {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().canonicalize().unwrap();
    let mut model = Model::dense(2);
    model.tensor("blk.1.big.weight", &[32, 5184], TensorType::F32);
    let from = Store::open(&dir.join("from")).unwrap();
    let path = dir.join("model.gguf");
    model.write(&path);
    let id = from.import(&path, None, &mut |_| {}).unwrap().id;
    let to = Store::open(&dir.join("to")).unwrap();
    let manifest = from.manifest_bytes(id).unwrap();
    to.put_fetched(&manifest, &from.metadata(id).unwrap())
        .unwrap();
    Place {
        _temp: temp,
        dir,
        model,
        from,
        to,
        id,
        manifest: Manifest::decode(&manifest).unwrap(),
    }
}

impl Place {
    fn big(&self) -> &ShardEntry {
        let big = self.manifest.shard(ShardKind::Layer(1)).unwrap();
        assert!(big.bytes > 40 * GROUP_BYTES && !big.bytes.is_multiple_of(GROUP_BYTES));
        big
    }

    fn open(&self, shard: &ShardEntry) -> OpenShard {
        self.from.open_shard(self.id, shard.id).unwrap().unwrap()
    }

    fn blob(&self, shard: &ShardEntry) -> PathBuf {
        self.to.dir().join("blobs").join(shard.id.to_string())
    }

    fn fetch(&self, shard: &ShardEntry) {
        let Taken::Partly(partial) = self.to.take_shard(shard).unwrap() else {
            return;
        };
        let open = self.open(shard);
        for range in partial.missing(16) {
            partial
                .take(&range, Cursor::new(given(&open, range.clone())))
                .unwrap();
        }
        partial.finish().unwrap();
        // As a second task does that shared it.
        partial.finish().unwrap();
    }
}

fn partly(store: &Store, shard: &ShardEntry) -> Partial {
    match store.take_shard(shard).unwrap() {
        Taken::Partly(partial) => *partial,
        Taken::Whole => panic!("it is here"),
    }
}

fn given(open: &OpenShard, groups: std::ops::Range<u32>) -> Vec<u8> {
    let mut out = Vec::new();
    open.give(&groups, &mut out).unwrap();
    assert_eq!(
        out.len() as u64,
        encoded_len(open.bytes(), &groups),
        "{groups:?}"
    );
    out
}

#[test]
fn a_model_is_fetched_shard_by_shard_and_read_back() {
    let at = place();
    assert!(
        at.to
            .reader(at.id)
            .unwrap_err()
            .to_string()
            .contains("shoal pull")
    );
    let here = at.to.here(at.id).unwrap();
    assert_eq!((here.layers, here.shards), (vec![], 1), "the metadata");
    let layer = at.manifest.shard(ShardKind::Layer(0)).unwrap();
    at.fetch(layer);
    let here = at.to.here(at.id).unwrap();
    assert_eq!(here.layers, [], "the first layer has no embedding yet");
    for shard in at.manifest.shards_of(LayerRange { start: 0, end: 1 }) {
        at.fetch(shard);
    }
    let span = LayerRange { start: 0, end: 1 };
    assert_eq!(at.to.here(at.id).unwrap().layers, [span]);
    let reader = at.to.reader(at.id).unwrap();
    let mut out = Vec::new();
    reader.read_tensor("blk.0.attn_q.weight", &mut out).unwrap();
    reader.read_tensor("rope_freqs.weight", &mut out).unwrap();
    let absent = reader
        .read_tensor("blk.1.attn_q.weight", &mut out)
        .unwrap_err();
    assert!(absent.to_string().contains("layer 1 of model"), "{absent}");

    for shard in &at.manifest.shards[1..] {
        at.fetch(shard);
    }
    let here = at.to.here(at.id).unwrap();
    assert!(here.is_whole(), "{here:?}");
    let reader = at.to.reader(at.id).unwrap();
    for (info, bytes) in &at.model.tensors {
        reader.read_tensor(&info.name, &mut out).unwrap();
        assert!(&out == bytes, "{}", info.name);
    }
    assert!(matches!(at.to.take_shard(at.big()), Ok(Taken::Whole)));
    // The whole file again: what it would be imported as.
    let whole = at.dir.join("whole.gguf");
    let mut file = fs::File::create(&whole).unwrap();
    at.to.assemble(at.id, &mut file, &mut |_| {}).unwrap();
    assert_eq!(
        shard_registry::identify(&whole, &mut |_| {}).unwrap(),
        at.id
    );
    // What was fetched is given on.
    let open = at.to.open_shard(at.id, at.big().id).unwrap().unwrap();
    assert_eq!(given(&open, 3..9), given(&at.open(at.big()), 3..9));
}

/// Any length, any range: what is given is what is taken, and as long as was said.
#[test]
fn ranges_of_every_length_are_as_long_as_is_said() {
    let at = place();
    let open = at.open(at.big());
    let last = groups_of(at.big().bytes);
    for start in 0..last {
        for end in [start + 1, start + 2, start + 7, last] {
            if end <= last {
                given(&open, start..end);
            }
        }
    }
    for asked in [0..0, 0..last + 1, last..last + 1, u32::MAX - 1..u32::MAX] {
        let refused = open.give(&asked, &mut Vec::new()).unwrap_err();
        assert!(matches!(refused, GiveError::Range { .. }), "{refused}");
    }
}

#[test]
fn a_wrong_byte_is_refused_within_its_group_and_what_came_before_it_stays() {
    let at = place();
    let (shard, open) = (at.big(), at.open(at.big()));
    let partial = partly(&at.to, shard);
    let mut bytes = given(&open, 0..16);
    let len = bytes.len();
    bytes[len - 1] ^= 1;
    let wrong = partial.take(&(0..16), Cursor::new(&bytes)).unwrap_err();
    assert!(matches!(wrong, TakeError::Wrong { group: 15 }), "{wrong}");
    assert!(partial.has(&(0..15)) && !partial.has(&(15..16)));
    // The hashes on the way to the groups are held against each other too.
    let mut bytes = given(&open, 16..32);
    bytes[5] ^= 1;
    let wrong = partial.take(&(16..32), Cursor::new(&bytes)).unwrap_err();
    assert!(matches!(wrong, TakeError::Wrong { .. }), "{wrong}");
    assert!((16..32).all(|group| !partial.has(&(group..group + 1))));
    // Another range's bytes, bytes that end, bytes of nothing.
    let other = given(&open, 20..24);
    assert!(matches!(
        partial.take(&(24..28), Cursor::new(&other)),
        Err(TakeError::Wrong { .. })
    ));
    let short = &other[..other.len() - 1];
    assert!(matches!(
        partial.take(&(20..24), short),
        Err(TakeError::Broken(_))
    ));
    assert!(matches!(
        partial.take(&(24..28), Cursor::new(vec![0; 99_999])),
        Err(TakeError::Wrong { .. })
    ));
    let incomplete = partial.finish().unwrap_err();
    assert!(
        matches!(incomplete, BlobError::Incomplete { missing: 23, .. }),
        "{incomplete}"
    );
    assert!(!at.blob(shard).exists());
}

#[test]
fn what_a_killed_process_left_is_verified_and_only_the_rest_is_fetched() {
    let at = place();
    let (shard, open) = (at.big(), at.open(at.big()));
    let partial = partly(&at.to, shard);
    partial
        .take(&(0..16), Cursor::new(given(&open, 0..16)))
        .unwrap();
    partial
        .take(&(30..40), Cursor::new(given(&open, 30..40)))
        .unwrap();
    let busy = at.to.take_shard(shard).unwrap_err();
    assert!(matches!(busy, BlobError::Busy { .. }), "{busy}");
    // A kill: nothing is synced, nothing is closed in order.
    drop(partial);
    let folder = at.to.dir().join("partial");
    let data = folder.join(format!("{}.data", shard.id));
    let again = partly(&at.to, shard);
    assert_eq!(again.missing(64), [16..30, 40..41]);
    drop(again);
    // Torn by the disk: one group of zeros, one flipped bit, and half of the hashes gone.
    let file = OpenOptions::new().write(true).open(&data).unwrap();
    file.write_all_at(&[0; GROUP_BYTES as usize], 3 * GROUP_BYTES)
        .unwrap();
    file.write_all_at(&[0xff], 35 * GROUP_BYTES + 77).unwrap();
    let again = partly(&at.to, shard);
    assert_eq!(again.missing(64), [3..4, 16..30, 35..36, 40..41]);
    drop(again);
    let tree = folder.join(format!("{}.tree", shard.id));
    let len = fs::metadata(&tree).unwrap().len();
    let file = OpenOptions::new().write(true).open(&tree).unwrap();
    file.write_all_at(&vec![0; (len / 2) as usize], len / 2)
        .unwrap();
    let again = partly(&at.to, shard);
    let missing = again.missing(64);
    assert!(
        missing.iter().any(|range| range.contains(&35)),
        "{missing:?}"
    );
    drop(again);
    // A file of another length is not believed at all.
    let file = OpenOptions::new().write(true).open(&data).unwrap();
    file.set_len(shard.bytes - 1).unwrap();
    let missing = partly(&at.to, shard).missing(64);
    assert_eq!((missing.len(), &missing[0]), (1, &(0..41)));
    at.fetch(shard);
    assert_eq!(ShardId::of(&fs::read(at.blob(shard)).unwrap()), shard.id);
    assert_eq!(
        fs::read_dir(&folder).unwrap().count(),
        0,
        "nothing is left over"
    );
}

#[test]
fn what_is_here_of_a_shard_is_given_on_while_the_rest_arrives() {
    let at = place();
    let (shard, open) = (at.big(), at.open(at.big()));
    let partial = Arc::new(partly(&at.to, shard));
    partial
        .take(&(8..16), Cursor::new(given(&open, 8..16)))
        .unwrap();
    let on_its_way = OpenShard::partly(partial.clone());
    assert_eq!(given(&on_its_way, 9..12), given(&open, 9..12));
    let early = on_its_way.give(&(15..17), &mut Vec::new()).unwrap_err();
    assert!(matches!(early, GiveError::NotYet), "{early}");
    // Damaged behind our back: refused, not given.
    let data = at
        .to
        .dir()
        .join("partial")
        .join(format!("{}.data", shard.id));
    let file = OpenOptions::new().write(true).open(data).unwrap();
    file.write_all_at(&[1, 2, 3], 10 * GROUP_BYTES).unwrap();
    let mut out = Vec::new();
    let refused = on_its_way.give(&(9..12), &mut out).unwrap_err();
    assert!(matches!(refused, GiveError::Changed { .. }), "{refused}");
    assert!(
        given(&open, 9..12).starts_with(&out),
        "what went out before is right"
    );
}

#[test]
fn a_damaged_blob_is_never_given_or_read_and_is_fetched_again() {
    let at = place();
    let shard = at.big();
    at.fetch(shard);
    let path = at.blob(shard);
    let open = at.to.open_shard(at.id, shard.id).unwrap().unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0xaa], 20 * GROUP_BYTES + 5).unwrap();
    // One that was open already, one that is opened now, a reader.
    assert!(matches!(
        open.give(&(20..21), &mut Vec::new()),
        Err(GiveError::Changed { .. })
    ));
    given(&open, 0..20);
    let refused = at.to.open_shard(at.id, shard.id).unwrap_err();
    assert!(refused.to_string().contains("shoal pull"), "{refused}");
    let reader = at.to.reader(at.id).unwrap();
    let refused = reader
        .read_tensor("blk.1.big.weight", &mut Vec::new())
        .unwrap_err();
    assert!(refused.to_string().contains("fetch it again"), "{refused}");
    assert!(!at.to.check_blob(shard).unwrap() && !path.exists());
    at.fetch(shard);
    assert!(at.to.check_blob(shard).unwrap());
    // Truncated: not here.
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(GROUP_BYTES)
        .unwrap();
    assert!(!at.to.has_blob(shard) && at.to.is_cut_off(shard));
    let refused = at.to.open_shard(at.id, shard.id).unwrap_err();
    assert!(matches!(refused, GiveError::Changed { .. }), "{refused}");
    assert!(!at.to.check_blob(shard).unwrap());
    at.fetch(shard);
    assert!(at.to.check_blob(shard).unwrap());
}

#[test]
fn a_file_that_changed_since_it_was_imported_is_not_given() {
    let at = place();
    let shard = at.big();
    let open = at.open(shard);
    let path = at.dir.join("model.gguf");
    let bytes = fs::read(&path).unwrap();
    let (info, big) = at.model.tensors.last().unwrap();
    assert_eq!(info.name, "blk.1.big.weight");
    let start = bytes
        .windows(64)
        .position(|window| window == &big[..64])
        .unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[bytes[start + 99_999] ^ 1], start as u64 + 99_999)
        .unwrap();
    let last = groups_of(shard.bytes);
    let given: Vec<bool> = (0..last)
        .map(|group| open.give(&(group..group + 1), &mut Vec::new()).is_ok())
        .collect();
    assert_eq!(
        given.iter().filter(|given| !**given).count(),
        1,
        "one group"
    );
    let refused = at.from.open_shard(at.id, shard.id).unwrap_err();
    assert!(refused.to_string().contains("shoal import"), "{refused}");
    let small = at.manifest.shard(ShardKind::Layer(0)).unwrap();
    assert!(
        at.from.open_shard(at.id, small.id).unwrap().is_some(),
        "the others are as they were"
    );
}

/// Root may write anything: the test says nothing then.
#[test]
fn a_store_that_cannot_be_written_says_what_to_do() {
    use std::os::unix::fs::PermissionsExt;
    let at = place();
    let folder = at.to.dir().join("partial");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o500)).unwrap();
    let writable = fs::write(folder.join("probe"), b"x").is_ok();
    if !writable {
        let refused = at.to.take_shard(at.big()).unwrap_err().to_string();
        assert!(refused.contains("must be writable"), "{refused}");
    }
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    let full = BlobError::Io {
        path: folder.clone(),
        source: std::io::ErrorKind::StorageFull.into(),
    };
    assert!(full.to_string().contains("it goes on from there"), "{full}");
    // A folder where the file should be fails for everybody.
    fs::create_dir(folder.join(format!("{}.data", at.big().id))).unwrap();
    let refused = at.to.take_shard(at.big()).unwrap_err();
    assert!(matches!(refused, BlobError::Io { .. }), "{refused}");
}

#[test]
fn room_is_made_by_age_and_the_last_copy_goes_last_and_is_named() {
    let at = place();
    let shards = &at.manifest.shards[1..];
    for (shard, age) in shards.iter().zip([10, 40, 30, 20]) {
        at.fetch(shard);
        let file = fs::File::open(at.blob(shard)).unwrap();
        let used = SystemTime::now() - Duration::from_secs(age);
        file.set_times(fs::FileTimes::new().set_accessed(used))
            .unwrap();
    }
    let [embedding, first, second, head] = shards else {
        panic!("{shards:?}")
    };
    let all: u64 = shards.iter().map(|shard| shard.bytes).sum();
    let quota = |max_bytes| Quota {
        max_bytes: Some(max_bytes),
        reserve_bytes: 0,
    };
    let nothing = at
        .to
        .make_room(10, &quota(all + 10), &|_| Worth::Elsewhere)
        .unwrap();
    assert_eq!(nothing, []);
    // The oldest is needed, the next one is the last copy.
    let worth = |shard: &ShardId| match shard {
        id if *id == first.id => Worth::Needed,
        id if *id == second.id => Worth::LastCopy,
        _ => Worth::Elsewhere,
    };
    let gone = at.to.make_room(1, &quota(all), &worth).unwrap();
    assert_eq!(
        gone.iter().map(|gone| gone.shard).collect::<Vec<_>>(),
        [head.id]
    );
    let gone = at.to.make_room(1, &quota(first.bytes + 1), &worth).unwrap();
    let gone: Vec<_> = gone
        .iter()
        .map(|gone| (gone.shard, gone.last_copy))
        .collect();
    assert_eq!(gone, [(embedding.id, false), (second.id, true)]);
    let refused = at
        .to
        .make_room(2, &quota(first.bytes + 1), &worth)
        .unwrap_err();
    assert!(refused.to_string().contains("--disk"), "{refused}");
    let full = Quota {
        max_bytes: None,
        reserve_bytes: u64::MAX,
    };
    let refused = at.to.make_room(2, &full, &worth).unwrap_err();
    assert!(refused.to_string().contains("stay free"), "{refused}");
    assert!(at.blob(first).exists(), "needed");
}

#[test]
fn what_cannot_fit_takes_nothing_away() {
    let at = place();
    let (small, big) = (at.manifest.shard(ShardKind::Layer(0)).unwrap(), at.big());
    at.fetch(small);
    let quota = Quota {
        max_bytes: Some(big.bytes - 1),
        reserve_bytes: 0,
    };
    let refused = at.to.make_room(big.bytes, &quota, &|_| Worth::Elsewhere);
    assert!(
        matches!(refused, Err(BlobError::Quota { .. })),
        "{refused:?}"
    );
    assert!(at.blob(small).exists());
}

/// What is here of a shard already needs no second place: else a download that was broken off could not go on.
#[test]
fn a_partial_counts_once() {
    let at = place();
    let (shard, open) = (at.big(), at.open(at.big()));
    assert_eq!(at.to.still_needed(shard), shard.bytes);
    let partial = partly(&at.to, shard);
    partial
        .take(&(0..32), Cursor::new(given(&open, 0..32)))
        .unwrap();
    assert_eq!(partial.first_missing(&(16..40)), 32);
    assert_eq!(partial.first_missing(&(16..32)), 32);
    assert_eq!(partial.first_missing(&(35..40)), 35);
    drop(partial);
    let needed = at.to.still_needed(shard);
    assert!(needed <= shard.bytes - 32 * GROUP_BYTES, "{needed}");
    // As much as the shard takes, and the hashes beside it.
    let quota = Quota {
        max_bytes: Some(shard.bytes + (64 << 10)),
        reserve_bytes: 0,
    };
    let gone = at.to.make_room(needed, &quota, &|_| Worth::Needed);
    assert_eq!(gone.unwrap(), []);
    at.fetch(shard);
    assert_eq!(at.to.still_needed(shard), 0);
}

#[test]
fn removing_takes_what_was_fetched_and_never_the_users_file() {
    let at = place();
    for shard in &at.manifest.shards[1..] {
        at.fetch(shard);
    }
    at.to.set_alias(&"mine".parse().unwrap(), at.id).unwrap();
    let removed = at.to.remove_model(at.id).unwrap();
    assert_eq!(
        (removed.blobs, removed.aliases.as_slice()),
        (4, &["mine".to_owned()][..])
    );
    assert!(at.to.models().0.is_empty() && at.to.remove_model(at.id).is_err());
    assert_eq!(fs::read_dir(at.to.dir().join("blobs")).unwrap().count(), 0);
    let removed = at.from.remove_model(at.id).unwrap();
    assert_eq!(removed.files, [at.dir.join("model.gguf")]);
    assert!(at.dir.join("model.gguf").exists());
}

#[test]
fn a_collection_takes_old_partials_and_shards_of_no_model() {
    let at = place();
    let (big, small) = (at.big(), at.manifest.shard(ShardKind::Layer(0)).unwrap());
    at.fetch(small);
    let stray = at
        .to
        .dir()
        .join("blobs")
        .join(ShardId::of(b"stray").to_string());
    fs::write(&stray, b"stray").unwrap();
    let partial = partly(&at.to, big);
    let kept = at.to.collect(Duration::ZERO).unwrap();
    assert_eq!((kept.partials, kept.blobs), (0, 1), "it is being written");
    assert!(!stray.exists() && at.to.has_blob(small));
    drop(partial);
    assert_eq!(
        at.to.collect(Duration::from_secs(60)).unwrap().partials,
        0,
        "too young"
    );
    assert_eq!(at.to.collect(Duration::ZERO).unwrap().partials, 1);
    // A description that cannot be read might name anything.
    fs::write(&stray, b"stray").unwrap();
    let manifest = at
        .to
        .dir()
        .join("models")
        .join(at.id.to_string())
        .join("manifest");
    fs::write(manifest, b"torn").unwrap();
    assert_eq!(at.to.collect(Duration::ZERO).unwrap().blobs, 0);
    assert!(stray.exists());
}
