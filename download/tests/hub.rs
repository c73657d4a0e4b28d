//! Files of a hub: its cache, its refusals, broken connections, and who is told the token.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod support;

use std::fs;

use download::{DownloadError, Progress, Source, obtain};
use support::{COMMIT, World, body, files_below, sha256};

const FILE: &str = "hf:owner/repo/m.gguf";

fn world() -> World {
    World::new(&[("m.gguf", body(1, 600_000)), ("README.md", vec![1])])
}

#[test]
fn a_file_comes_into_the_hubs_own_cache_and_is_asked_for_once() {
    let world = world();
    let mut seen: Vec<Progress> = vec![];
    let source: Source = FILE.parse().unwrap();
    let path = obtain(&source, &world.settings, &mut |at| seen.push(at)).unwrap();
    let cache = world.cache();
    assert_eq!(path, cache.join("snapshots").join(COMMIT).join("m.gguf"));
    assert_eq!(fs::read(&path).unwrap(), body(1, 600_000));
    let blob = cache.join("blobs").join(sha256(&body(1, 600_000)));
    assert_eq!(path.canonicalize().unwrap(), blob.canonicalize().unwrap());
    assert!(
        fs::read_link(&path).unwrap().is_relative(),
        "the cache may be moved"
    );
    assert_eq!(fs::read_to_string(cache.join("refs/main")).unwrap(), COMMIT);
    assert!(seen.is_sorted_by_key(|at| at.done) && seen.iter().all(|at| at.total == 600_000));
    assert_eq!(seen.last().unwrap().done, 600_000);
    assert_eq!(world.fetched().len(), 1);
    let left = files_below(&cache)
        .into_iter()
        .filter(|file| file.to_string_lossy().contains("incomplete"));
    assert_eq!(left.count(), 0);
    // Again: the hub is asked what it is, nobody for the bytes.
    world.hub.asked();
    assert_eq!(world.obtain(FILE).unwrap(), path);
    assert_eq!(world.hub.asked().len(), 1);
    assert_eq!(world.fetched().len(), 0);
    // A commit cannot change: nobody is asked at all.
    assert_eq!(world.obtain(&format!("{FILE}@{COMMIT}")).unwrap(), path);
    assert_eq!(world.hub.asked().len(), 0);
}

#[test]
fn what_another_client_of_the_hub_left_is_used() {
    let world = world();
    let blobs = world.cache().join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    let bytes = body(1, 600_000);
    fs::write(blobs.join(sha256(&bytes)), &bytes).unwrap();
    let path = world.obtain(FILE).unwrap();
    assert_eq!(fs::read(path).unwrap(), bytes);
    assert_eq!(world.fetched().len(), 0);
}

#[test]
fn a_cut_download_goes_on_where_it_stopped() {
    let world = world();
    world.store.plan().cuts = vec![100_000, 0, 50_000];
    let path = world.obtain(FILE).unwrap();
    assert_eq!(fs::read(path).unwrap(), body(1, 600_000));
    let ranges: Vec<_> = world
        .fetched()
        .into_iter()
        .map(|asked| asked.range)
        .collect();
    let from = |n: u32| Some(format!("bytes={n}-"));
    assert_eq!(ranges, [None, from(100_000), from(100_000), from(150_000)]);
}

#[test]
fn a_connection_that_breaks_again_and_again_is_given_up_and_the_next_call_goes_on() {
    let world = world();
    world.store.plan().cuts = [200_000].into_iter().chain([0; 5]).collect();
    let error = world.obtain(FILE).unwrap_err();
    assert!(
        matches!(
            error,
            DownloadError::Cut {
                done: 200_000,
                total: 600_000,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.remedy().unwrap().contains("goes on where it stopped"));
    world.fetched();
    world.obtain(FILE).unwrap();
    assert_eq!(world.fetched()[0].range.as_deref(), Some("bytes=200000-"));
}

#[test]
fn a_server_that_falls_silent_is_left_and_asked_again() {
    let mut world = world();
    world.settings.silence = std::time::Duration::from_millis(200);
    let mut plan = world.store.plan();
    (plan.silent, plan.cuts) = (true, vec![100_000, 0]);
    drop(plan);
    let path = world.obtain(FILE).unwrap();
    assert_eq!(fs::read(path).unwrap(), body(1, 600_000));
    assert_eq!(world.fetched().len(), 3);
}

#[test]
fn what_lies_there_is_hashed_too_and_wrong_bytes_are_thrown_away() {
    let world = world();
    let bytes = body(1, 600_000);
    let blob = world.cache().join("blobs").join(sha256(&bytes));
    fs::create_dir_all(blob.parent().unwrap()).unwrap();
    let incomplete = blob.with_extension("incomplete");
    fs::write(&incomplete, [7; 1000]).unwrap();
    let error = world.obtain(FILE).unwrap_err();
    assert!(matches!(error, DownloadError::Hash { .. }), "{error}");
    assert!(!incomplete.exists() && !blob.exists());
    world.obtain(FILE).unwrap();
    // A server without ranges sends all of it again.
    fs::remove_file(&blob).unwrap();
    fs::write(&incomplete, &bytes[..5000]).unwrap();
    world.store.plan().no_ranges = true;
    world.obtain(FILE).unwrap();
    assert_eq!(fs::read(&blob).unwrap(), bytes);
    // Another file than was announced.
    let other = self::world();
    other.hub.plan().announced = Some("ab".repeat(32));
    let error = other.obtain(FILE).unwrap_err();
    assert!(matches!(error, DownloadError::Hash { .. }), "{error}");
    assert!(
        files_below(&other.cache()).is_empty(),
        "nothing wrong is kept"
    );
}

#[test]
fn a_body_of_another_length_is_refused() {
    let world = world();
    world
        .store
        .plan()
        .bodies
        .insert("/store/m.gguf".into(), body(1, 599_999));
    let error = world.obtain(FILE).unwrap_err();
    assert!(error.to_string().contains("600000 bytes"), "{error}");
}

#[test]
fn the_token_goes_to_the_hub_and_to_nobody_it_sends_us_to() {
    let mut world = world();
    world.hub.plan().token = Some("hf_secret".into());
    world.token("hf_secret");
    world.obtain(FILE).unwrap();
    let asked = world.hub.asked();
    assert!(
        !asked.is_empty()
            && asked
                .iter()
                .all(|a| a.token.as_deref() == Some("Bearer hf_secret"))
    );
    let asked = world.store.asked();
    assert!(
        !asked.is_empty() && asked.iter().all(|a| a.token.is_none()),
        "{asked:?}"
    );
    // Nor to a plain address.
    world
        .store
        .plan()
        .bodies
        .insert("/m.gguf".into(), body(2, 10));
    world
        .obtain(&format!("{}/m.gguf", world.store.address))
        .unwrap();
    assert!(world.store.asked().iter().all(|a| a.token.is_none()));
}

#[test]
fn refusals_say_what_to_do() {
    let mut world = world();
    world.hub.plan().token = Some("hf_right".into());
    let said = |world: &World| {
        let error = world.obtain(FILE).unwrap_err();
        let remedy = error.remedy().unwrap_or_default();
        let text = format!("{error}; {remedy}");
        assert!(!text.contains("hf_wrong"), "{text}");
        text
    };
    assert!(said(&world).contains("without a token"));
    world.token("hf_wrong");
    assert!(said(&world).contains("the owner of this token"));
    world.hub.plan().refusal = Some((403, "GatedRepo"));
    let gated = said(&world);
    assert!(
        gated.contains("is gated") && gated.contains("/owner/repo, then"),
        "{gated}"
    );
    world.settings.token = None;
    assert!(said(&world).contains("set HF_TOKEN"));
}

#[test]
fn what_is_not_there_is_named_and_what_is_there_is_listed() {
    let world = world();
    let error = world
        .obtain("hf:owner/repo/n.gguf")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("n.gguf") && error.ends_with("its models are m.gguf"),
        "{error}"
    );
    let error = world.obtain("hf:owner/repo/m.gguf@v9").unwrap_err();
    assert!(matches!(error, DownloadError::NoRevision { .. }), "{error}");
    let error = world.obtain("hf:owner/other/m.gguf").unwrap_err();
    assert!(error.to_string().contains("owner/other"), "{error}");
    assert!(
        world.obtain("hf:owner/repo/m.gguf@refs/pr/1").is_ok(),
        "a revision with slashes"
    );
    assert_eq!(
        fs::read_to_string(world.cache().join("refs/refs/pr/1")).unwrap(),
        COMMIT
    );
}

#[test]
fn a_word_names_a_file_and_several_are_listed() {
    let files = [
        ("m-Q8_0.gguf", body(1, 10)),
        ("m-Q4_K_M.gguf", body(2, 10)),
        ("n-Q8_0.gguf", body(3, 10)),
    ];
    let world = World::new(&files);
    let path = world.obtain("hf:owner/repo:q4_k_m").unwrap();
    assert!(path.ends_with("m-Q4_K_M.gguf"));
    assert_eq!(
        fs::read_to_string(world.cache().join("refs/main")).unwrap(),
        COMMIT
    );
    assert_eq!(
        world.obtain("hf:owner/repo").unwrap(),
        path,
        "the usual one"
    );
    let error = world.obtain("hf:owner/repo:Q8_0").unwrap_err();
    assert!(
        error.to_string().ends_with("m-Q8_0.gguf, n-Q8_0.gguf"),
        "{error}"
    );
    assert_eq!(error.remedy().unwrap(), "hf:owner/repo/m-Q8_0.gguf");
    let error = world.obtain("hf:owner/repo:Q5_0").unwrap_err();
    assert!(
        error.to_string().contains("no model called Q5_0"),
        "{error}"
    );
}

#[test]
fn all_parts_of_a_model_come_from_one_commit_and_a_page_counts_as_its_file() {
    let part = |n| (format!("big/m-0000{n}-of-00003.gguf"), body(n, 1000));
    let files: Vec<_> = (1..=3).map(part).collect();
    let files: Vec<_> = files
        .iter()
        .map(|(name, body)| (name.as_str(), body.clone()))
        .collect();
    let world = World::new(&files);
    let page = format!(
        "{}/owner/repo/blob/main/big/m-00002-of-00003.gguf",
        world.hub.address
    );
    let path = world.obtain(&page).unwrap();
    assert!(path.ends_with("big/m-00001-of-00003.gguf"));
    for (name, body) in &files {
        let part = path.parent().unwrap().join(name.trim_start_matches("big/"));
        assert_eq!(fs::read(part).unwrap(), *body);
    }
    let asked = world.hub.asked().into_iter().filter(|a| a.method == "HEAD");
    let revisions: Vec<_> = asked.map(|a| a.path.contains(COMMIT)).collect();
    assert_eq!(revisions, [false, true, true]);
}

#[test]
fn offline_only_what_is_here() {
    let mut world = world();
    world.settings.offline = true;
    let error = world.obtain(FILE).unwrap_err();
    assert!(matches!(error, DownloadError::Offline { .. }), "{error}");
    assert!(world.hub.asked().is_empty());
    world.settings.offline = false;
    let path = world.obtain(FILE).unwrap();
    world.hub.asked();
    world.settings.offline = true;
    assert_eq!(world.obtain(FILE).unwrap(), path);
    assert_eq!(world.obtain("hf:owner/repo").unwrap(), path);
    assert!(world.hub.asked().is_empty());
    // Nobody listens there any more: the same as offline, for what is here.
    world.settings.offline = false;
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    world.settings.endpoint = nobody.parse().unwrap();
    assert_eq!(world.obtain(FILE).unwrap(), path);
    let error = world.obtain("hf:owner/repo/n.gguf").unwrap_err();
    assert!(
        matches!(error, DownloadError::Unreachable { .. }),
        "{error}"
    );
}

#[test]
fn names_from_a_server_lead_nowhere_else() {
    let world = world();
    for odd in ["../../evil", "", "a/b", "..", "x y"] {
        world.hub.plan().announced = Some(odd.into());
        let error = world.obtain(FILE).unwrap_err();
        assert!(
            matches!(error, DownloadError::Server { .. }),
            "{odd}: {error}"
        );
    }
    world.hub.plan().files = vec!["../../../evil.gguf".into()];
    let error = world.obtain("hf:owner/repo").unwrap_err();
    assert!(matches!(error, DownloadError::NoFile { .. }), "{error}");
}

#[test]
fn a_file_that_another_program_fetches_is_left_to_it() {
    let world = world();
    let locks = world.settings.cache.join(".locks/models--owner--repo");
    fs::create_dir_all(&locks).unwrap();
    let sha256 = sha256(&body(1, 600_000));
    let held = fs::File::create(locks.join(format!("{sha256}.lock"))).unwrap();
    held.lock().unwrap();
    let error = world.obtain(FILE).unwrap_err();
    assert!(matches!(error, DownloadError::Busy { .. }), "{error}");
    drop(held);
    world.obtain(FILE).unwrap();
}

#[test]
fn more_than_the_disk_holds_is_refused_before_it_is_fetched() {
    let world = world();
    world.hub.plan().size = Some(u64::MAX);
    let error = world.obtain(FILE).unwrap_err();
    assert!(matches!(error, DownloadError::NoRoom { .. }), "{error}");
    assert!(world.fetched().is_empty());
}
