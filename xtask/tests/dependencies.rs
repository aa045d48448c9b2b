//! What the workspace says of its dependencies: each is used.

#![allow(clippy::unwrap_used)]

use std::{collections::BTreeSet, fs, path::Path};

/// The keys of the tables of a manifest whose header ends with `dependencies]`, as `name` or `name.workspace`.
fn dependencies(manifest: &str) -> BTreeSet<&str> {
    let tables = manifest.split("\n[").filter(|table| {
        let header = table.lines().next().unwrap_or_default();
        header.trim_start_matches('[').ends_with("dependencies]")
    });
    let keys = tables.flat_map(|table| table.lines().skip(1)).filter_map(|line| line.split_once('='));
    keys.map(|(key, _)| key.trim())
        .filter(|key| key.starts_with(|first: char| first.is_ascii_alphabetic()))
        .map(|key| key.split('.').next().unwrap_or(key))
        .collect()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

/// The directories of the workspace's members.
fn members(manifest: &str) -> Vec<&str> {
    let list = manifest.split_once("members = [").unwrap().1.split_once(']').unwrap().0;
    list.split(',')
        .map(|member| member.trim().trim_matches('"'))
        .filter(|member| !member.is_empty())
        .collect()
}

/// Whether a Rust file below the directory names the crate.
fn named_below(directory: &Path, name: &str) -> bool {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).any(|path| {
        if path.is_dir() {
            return !path.join("Cargo.toml").exists()
                && !path.ends_with("target")
                && named_below(&path, name);
        }
        path.extension().is_some_and(|extension| extension == "rs") && read(&path).contains(name)
    })
}

#[test]
fn dependencies_of_the_workspace_are_used_by_a_member() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let manifest = read(&workspace.join("Cargo.toml"));
    let mut unused = dependencies(&manifest).into_iter().map(str::to_owned).collect::<BTreeSet<_>>();
    assert!(unused.len() > 20, "the manifest was not understood: {unused:?}");
    for member in members(&manifest) {
        for name in dependencies(&read(&workspace.join(member).join("Cargo.toml"))) {
            unused.remove(name);
        }
    }
    assert!(unused.is_empty(), "no member uses {unused:?}");
}

#[test]
fn dependencies_of_a_member_are_named_in_its_sources() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for member in members(&read(&workspace.join("Cargo.toml"))) {
        let directory = workspace.join(member);
        for name in dependencies(&read(&directory.join("Cargo.toml"))) {
            // Named by what tonic generates only.
            let generated = name == "tonic-prost";
            let used = generated || named_below(&directory, &name.replace('-', "_"));
            assert!(used, "{member} depends on {name} and does not name it");
        }
    }
}

#[test]
fn dependencies_are_read_from_every_kind_of_table() {
    let manifest = "[package]\nname = \"x\"\n[dependencies]\na.workspace = true\nb = { version = \"1\", features = [\n  \"c\",\n] }\n\
                    [dev-dependencies]\nd = \"1\"\n[lints]\nworkspace = true\n";
    assert_eq!(dependencies(manifest), ["a", "b", "d"].into());
}
