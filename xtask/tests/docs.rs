//! The documentation names files and folders of the workspace: they are there.

#![allow(clippy::unwrap_used)]

use std::{fs, path::Path};

/// What names of the workspace's files begin with.
const ROOTS: [&str; 10] = [
    "agent/",
    "deploy/",
    "docs/",
    "guest-kernel-config/",
    "protocol/",
    "shim/",
    "tests/",
    "vmm/",
    "xtask/",
    ".ci/",
];

/// Names in `text`, between backquotes, of files or folders of the workspace.
fn named(text: &str) -> impl Iterator<Item = &str> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter(|name| {
        // Capitals stand for a name of the reader's choice.
        let concrete = !name.contains([' ', '*', '|']) && !name.chars().any(char::is_uppercase);
        concrete && ROOTS.iter().any(|root| name.starts_with(root))
    })
}

#[test]
fn docs_name_files_that_exist() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let docs = fs::read_dir(workspace.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let pages = docs.chain(["README.md", "CONTRIBUTING.md"].map(|page| workspace.join(page)));
    let mut seen = 0;
    for page in pages.filter(|page| page.extension().is_some_and(|extension| extension == "md")) {
        let text = fs::read_to_string(&page).unwrap();
        for name in named(&text) {
            assert!(workspace.join(name).exists(), "{} names {name}", page.display());
            seen += 1;
        }
    }
    assert!(seen > 20, "the pages name only {seen} files");
}
