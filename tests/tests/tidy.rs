//! What the house rules say and no compiler checks: who depends on whom, how files begin and how long they are,
//! which versions are too old, and that every claim of SECURITY.md names a test that exists.

// Clippy takes the functions between the tests for production code.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tests::repository;

/// Longer files are divided; the aim is 250.
const LINES_MAX: usize = 700;

/// Names that say nothing about what is inside.
const BANNED_NAMES: [&str; 8] = [
    "util", "utils", "common", "helper", "helpers", "manager", "managers", "misc",
];

/// The oldest versions without a known hole, and the first line that is allowed at all.
const VERSION_FLOORS: [(&str, [u64; 3]); 7] = [
    ("libp2p", [0, 57, 1]),
    ("libp2p-gossipsub", [0, 50, 1]),
    ("quinn-proto", [0, 11, 19]),
    ("rustls", [0, 23, 46]),
    ("rustls-webpki", [0, 103, 16]),
    ("yamux", [0, 13, 10]),
    ("bincode", [2, 0, 1]),
];

#[test]
fn dependencies_are_those_of_the_architecture() {
    let written = edges(&read("ARCHITECTURE.md"));
    let mut found = BTreeMap::new();
    for package in packages() {
        let name = package["name"].as_str().unwrap().to_owned();
        if name != "tests" {
            let inner = dependencies(&package)
                .filter(|dependency| dependency["path"].is_string() && !is_dev(dependency));
            found.insert(name, names(inner));
        }
    }
    assert_eq!(
        written, found,
        "ARCHITECTURE.md's table (left) is not what the manifests say (right)"
    );
}

#[test]
fn only_node_names_libp2p_and_only_engine_llama() {
    for package in packages() {
        let name = package["name"].as_str().unwrap();
        for dependency in names(dependencies(&package)) {
            let owner = match dependency.as_str() {
                libp2p if libp2p.starts_with("libp2p") => "node",
                llama if llama.starts_with("llama") => "engine",
                _ => continue,
            };
            assert_eq!(name, owner, "{name} depends on {dependency}");
        }
    }
}

#[test]
fn every_crate_takes_the_lints_and_only_engine_allows_unsafe() {
    for package in packages() {
        let manifest = fs::read_to_string(package["manifest_path"].as_str().unwrap()).unwrap();
        assert!(
            manifest.contains("[lints]\nworkspace = true"),
            "{}: no workspace lints",
            package["name"]
        );
    }
    // Put together here, so that this file does not contain what it looks for.
    let escapes = ["allow", "expect"].map(|how| [how, "(unsafe_code"].concat());
    for (path, text) in sources() {
        let escapes = escapes.iter().any(|escape| text.contains(escape));
        assert!(
            path.starts_with("engine") || !escapes,
            "{} allows unsafe code",
            path.display()
        );
    }
}

#[test]
fn files_say_what_they_are_for_and_are_not_too_long() {
    for (path, text) in sources() {
        assert!(
            text.starts_with("//! "),
            "{} does not begin with `//! ` and what it is for",
            path.display()
        );
        let lines = text.lines().count();
        assert!(
            lines <= LINES_MAX,
            "{} has {lines} lines, the limit is {LINES_MAX}",
            path.display()
        );
    }
}

#[test]
fn names_say_something() {
    for (path, _) in sources() {
        for part in path.with_extension("").iter() {
            let part = part.to_string_lossy();
            assert!(
                !BANNED_NAMES.contains(&&*part),
                "{}: `{part}` says nothing",
                path.display()
            );
        }
    }
}

#[test]
fn versions_are_not_below_the_floors() {
    let lock = read("Cargo.lock");
    let locked = locked_versions(&lock);
    for (name, floor) in VERSION_FLOORS {
        let versions = locked
            .get(name)
            .unwrap_or_else(|| panic!("{name} is not in Cargo.lock: remove its floor"));
        for version in versions {
            assert!(
                numbers(version) >= floor,
                "{name} {version} is older than {floor:?}"
            );
        }
    }
}

#[test]
fn every_claim_of_security_names_a_test() {
    let security = read("SECURITY.md");
    let protected = security
        .split("## What is protected")
        .nth(1)
        .unwrap()
        .split("\n## ")
        .next()
        .unwrap();
    let rows: Vec<&str> = protected
        .lines()
        .filter(|line| line.starts_with('|'))
        .skip(2)
        .collect();
    assert!(!rows.is_empty(), "SECURITY.md has no table of claims");
    let all: String = sources().into_iter().map(|(_, text)| text).collect();
    for row in rows {
        let cell = row.trim_end_matches('|').rsplit('|').next().unwrap();
        let tests: Vec<&str> = cell.split('`').skip(1).step_by(2).collect();
        assert!(!tests.is_empty(), "names no test: {row}");
        for test in tests {
            let function = test.rsplit([':', ' ', '/']).next().unwrap();
            assert!(
                all.contains(&format!("fn {function}(")),
                "no test named {function}: {row}"
            );
        }
    }
}

#[test]
fn the_checks_above_can_fail() {
    assert_eq!(
        edges("x\n```edges\na -> b c\nb ->\n```\n")["a"],
        set(&["b", "c"])
    );
    assert!(numbers("0.11.9") < [0, 11, 19]);
    assert_eq!(numbers("1.2.3-rc.1+x"), [1, 2, 3]);
    let lock = "[[package]]\nname = \"a\"\nversion = \"1.0.0\"\n\n[[package]]\nname = \"a\"\nversion = \"2.0.0\"\n";
    assert_eq!(locked_versions(lock)["a"], ["1.0.0", "2.0.0"]);
}

fn read(file: &str) -> String {
    fs::read_to_string(repository().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// The table in the block fenced as `edges`: `crate -> dependencies`.
fn edges(document: &str) -> BTreeMap<String, BTreeSet<String>> {
    let block = document
        .split("```edges\n")
        .nth(1)
        .expect("a block fenced as `edges`")
        .split("```")
        .next()
        .unwrap();
    let pairs = block.lines().filter_map(|line| line.split_once("->"));
    pairs
        .map(|(from, to)| {
            (
                from.trim().to_owned(),
                set(&to.split_whitespace().collect::<Vec<_>>()),
            )
        })
        .collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// The workspace's crates, as cargo sees their manifests.
fn packages() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
            "--locked",
        ])
        .current_dir(repository())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

fn dependencies(package: &Value) -> impl Iterator<Item = &Value> {
    package["dependencies"].as_array().unwrap().iter()
}

fn is_dev(dependency: &Value) -> bool {
    dependency["kind"] == "dev"
}

fn names<'a>(dependencies: impl Iterator<Item = &'a Value>) -> BTreeSet<String> {
    dependencies
        .map(|dependency| dependency["name"].as_str().unwrap().to_owned())
        .collect()
}

/// Every Rust file of the workspace with its text, by its path from the root.
fn sources() -> Vec<(PathBuf, String)> {
    let root = repository();
    let mut found = Vec::new();
    for package in packages() {
        let folder = Path::new(package["manifest_path"].as_str().unwrap())
            .parent()
            .unwrap()
            .to_owned();
        collect(&folder, &mut found);
    }
    let inside = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        (path.strip_prefix(&root).unwrap().to_owned(), text)
    };
    found.into_iter().map(inside).collect()
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") {
            collect(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn locked_versions(lock: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in lock.split("[[package]]").skip(1) {
        let field = |name| {
            package
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_suffix('"'))
        };
        let (name, version) = (field("name = \"").unwrap(), field("version = \"").unwrap());
        versions.entry(name).or_default().push(version);
    }
    versions
}

fn numbers(version: &str) -> [u64; 3] {
    let core = version.split(['-', '+']).next().unwrap();
    let mut parts = core.split('.').map(|part| part.parse().unwrap());
    std::array::from_fn(|_| parts.next().unwrap_or(0))
}
