//! The modules of the VMM's crates form no cycle across folders: what a file names, directly or over others, never leads
//! back to it through another folder. Files of one folder may name each other, and tests may name everything.
//!
//! A name counts for the file that defines it, however it is re-exported on the way. Names in macros count as well.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs,
    path::{Path, PathBuf},
};

use syn::visit::{self, Visit};

/// The sources of the crates that are looked at.
const CRATES: [&str; 3] = ["vmm/src", "vmm/virtio/src", "vmm/api/src"];

/// A module by its names from the crate's root on.
type ModulePath = Vec<String>;

/// A module: a file, or a part of one.
#[derive(Default)]
struct Module {
    file: PathBuf,
    /// What `use` makes known here, by the name that it has here.
    imports: BTreeMap<String, Vec<String>>,
    /// What is imported as a whole.
    globs: Vec<Vec<String>>,
    /// Every path that is named.
    paths: BTreeSet<Vec<String>>,
    /// Names of what is defined here.
    items: BTreeSet<String>,
}

struct Crate(BTreeMap<ModulePath, Module>);

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        syn::Meta::List(list) if list.path.is_ident("cfg") => {
            list.tokens.to_string().split(|c: char| !c.is_alphanumeric()).any(|word| word == "test")
        }
        meta => meta.path().is_ident("test"),
    })
}

impl Crate {
    fn read(root: &Path) -> Self {
        let mut modules = Self(BTreeMap::new());
        modules.read_file(Vec::new(), &root.join("lib.rs"), root);
        modules
    }

    /// `below` is where the files of the module's own modules are.
    fn read_file(&mut self, path: ModulePath, file: &Path, below: &Path) {
        let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let parsed = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        self.read_items(path, file, below, &parsed.items);
    }

    fn read_items(&mut self, path: ModulePath, file: &Path, below: &Path, items: &[syn::Item]) {
        let mut module = Module { file: file.to_owned(), ..Module::default() };
        for item in items {
            match item {
                syn::Item::Mod(child) if is_test(&child.attrs) => {}
                syn::Item::Mod(child) => {
                    let name = child.ident.to_string();
                    let (child_path, folder) =
                        ([&path[..], std::slice::from_ref(&name)].concat(), below.join(&name));
                    match &child.content {
                        Some((_, items)) => self.read_items(child_path, file, &folder, items),
                        None => {
                            let nested = folder.join("mod.rs");
                            let own = below.join(format!("{name}.rs"));
                            let file = if nested.exists() { nested } else { own };
                            self.read_file(child_path, &file, &folder);
                        }
                    }
                }
                item => module.visit_item(item),
            }
        }
        self.0.insert(path, module);
    }

    /// The module that defines what `path` names in `module`; `None` for what is not of this crate.
    fn defining(&self, module: &[String], path: &[String], depth: usize) -> Option<ModulePath> {
        // Imports may be written in a circle, which the compiler refuses.
        if depth > 32 {
            return None;
        }
        let (first, mut rest) = path.split_first()?;
        let mut at = match first.as_str() {
            "crate" => Vec::new(),
            "self" => module.to_vec(),
            "super" => module[..module.len().checked_sub(1)?].to_vec(),
            name => {
                let child = [module, &[name.to_owned()]].concat();
                if self.0.contains_key(&child) {
                    child
                } else {
                    let import = self.0.get(module)?.imports.get(name)?;
                    if import.first().is_some_and(|first| first == name) && import.len() == 1 {
                        return None;
                    }
                    return self.defining(module, &[import, rest].concat(), depth + 1);
                }
            }
        };
        while let Some((name, after)) = rest.split_first() {
            let child = [&at[..], std::slice::from_ref(name)].concat();
            if name == "super" {
                at.pop()?;
            } else if self.0.contains_key(&child) {
                at = child;
            } else {
                return Some(self.exported(&at, name, after, depth));
            }
            rest = after;
        }
        Some(at)
    }

    /// The module behind what `module` says `name` is: another one's if it is imported there, or its own.
    fn exported(&self, module: &[String], name: &str, after: &[String], depth: usize) -> ModulePath {
        let Some(here) = self.0.get(module) else { return module.to_vec() };
        if let Some(import) = here.imports.get(name) {
            let import = [import, after].concat();
            return self.defining(module, &import, depth + 1).unwrap_or_else(|| module.to_vec());
        }
        if !here.items.contains(name) {
            for glob in &here.globs {
                if let Some(from) = self.defining(module, glob, depth + 1)
                    && self.0.get(&from).is_some_and(|from| from.items.contains(name))
                {
                    return from;
                }
            }
        }
        module.to_vec()
    }

    /// Which files each file names.
    fn edges(&self) -> BTreeMap<&Path, BTreeSet<&Path>> {
        let mut edges: BTreeMap<&Path, BTreeSet<&Path>> = BTreeMap::new();
        for (path, module) in &self.0 {
            let named = edges.entry(&module.file).or_default();
            let used = module.paths.iter().chain(module.imports.values()).chain(&module.globs);
            let targets = used.filter_map(|used| self.defining(path, used, 0));
            named
                .extend(targets.filter_map(|target| self.0.get(&target)).map(|target| target.file.as_path()));
            named.remove(module.file.as_path());
        }
        edges
    }

    /// The shortest cycle through more than one folder, if there is any.
    fn cycle(&self) -> Option<Vec<&Path>> {
        let edges = self.edges();
        let mut cycles = Vec::new();
        for (from, named) in &edges {
            // Every cycle across folders has a step from one into another.
            for to in named.iter().filter(|to| folder(to) != folder(from)) {
                cycles.extend(way(&edges, to, from).map(|way| [vec![*from], way].concat()));
            }
        }
        cycles.into_iter().min_by_key(Vec::len)
    }
}

/// The folder of a module: of one that has modules of its own, their folder, wherever its file is.
fn folder(file: &Path) -> PathBuf {
    let own = file.with_extension("");
    if own.is_dir() { own } else { file.parent().unwrap().to_owned() }
}

/// The shortest way from one file to another.
fn way<'a>(
    edges: &BTreeMap<&'a Path, BTreeSet<&'a Path>>,
    from: &'a Path,
    to: &Path,
) -> Option<Vec<&'a Path>> {
    let mut ways = VecDeque::from([vec![from]]);
    let mut seen = BTreeSet::from([from]);
    while let Some(way) = ways.pop_front() {
        let last = *way.last()?;
        if last == to {
            return Some(way);
        }
        for next in edges.get(last).into_iter().flatten().filter(|next| seen.insert(next)) {
            ways.push_back([&way[..], &[*next]].concat());
        }
    }
    None
}

impl Module {
    fn import(&mut self, tree: &syn::UseTree, prefix: &[String]) {
        let with = |name: &syn::Ident| [prefix, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.import(&path.tree, &with(&path.ident)),
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| self.import(tree, prefix)),
            syn::UseTree::Glob(_) => self.globs.push(prefix.to_vec()),
            syn::UseTree::Rename(rename) => {
                self.imports.insert(rename.rename.to_string(), with(&rename.ident));
            }
            syn::UseTree::Name(name) if name.ident == "self" => {
                let last = prefix.last().cloned().unwrap_or_default();
                self.imports.insert(last, prefix.to_vec());
            }
            syn::UseTree::Name(name) => {
                self.imports.insert(name.ident.to_string(), with(&name.ident));
            }
        }
    }

    /// The paths in what a macro is given, which is no syntax tree.
    fn tokens(&mut self, tokens: &str) {
        let spaced = tokens.replace("::", " :: ");
        let mut path: Vec<String> = Vec::new();
        let mut joined = false;
        for word in spaced.split_whitespace().chain([";"]) {
            let word = word.trim_matches(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
            if word == "::" {
                joined = true;
                continue;
            }
            if !joined && path.len() > 1 {
                self.paths.insert(std::mem::take(&mut path));
            }
            if !joined {
                path.clear();
            }
            path.push(word.to_owned());
            joined = false;
        }
    }
}

impl<'ast> Visit<'ast> for Module {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        let (attributes, name) = match item {
            syn::Item::Const(item) => (&item.attrs, Some(&item.ident)),
            syn::Item::Enum(item) => (&item.attrs, Some(&item.ident)),
            syn::Item::Fn(item) => (&item.attrs, Some(&item.sig.ident)),
            syn::Item::Static(item) => (&item.attrs, Some(&item.ident)),
            syn::Item::Struct(item) => (&item.attrs, Some(&item.ident)),
            syn::Item::Trait(item) => (&item.attrs, Some(&item.ident)),
            syn::Item::Type(item) => (&item.attrs, Some(&item.ident)),
            syn::Item::Impl(item) => (&item.attrs, None),
            syn::Item::Use(item) => (&item.attrs, None),
            _ => return visit::visit_item(self, item),
        };
        if !is_test(attributes) {
            self.items.extend(name.map(ToString::to_string));
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if !is_test(&function.attrs) {
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.import(&item.tree, &[]);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.paths.insert(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }

    /// `pub(super)` names nothing.
    fn visit_vis_restricted(&mut self, _: &'ast syn::VisRestricted) {}

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.tokens(&call.tokens.to_string());
    }
}

#[test]
fn modules_of_the_vmm_form_no_cycle_across_folders() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for sources in CRATES {
        let modules = Crate::read(&workspace.join(sources));
        assert!(modules.0.len() > 10, "{sources} was not understood: {:?}", modules.0.keys());
        if let Some(cycle) = modules.cycle() {
            let names = cycle.iter().map(|file| file.strip_prefix(workspace).unwrap().display().to_string());
            panic!("a cycle across folders:\n  {}", names.collect::<Vec<_>>().join("\n  names "));
        }
    }
}

fn cycle_of(files: &[(&str, &str)]) -> Option<Vec<String>> {
    let root = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = root.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let modules = Crate::read(root.path());
    let cycle = modules.cycle()?;
    Some(cycle.iter().map(|file| file.strip_prefix(root.path()).unwrap().display().to_string()).collect())
}

#[test]
fn cycles_are_found_through_imports_paths_macros_and_reexports() {
    let root = ("lib.rs", "mod a; mod b; pub use b::B;");
    let b = ("b/mod.rs", "use crate::a::A; pub struct B(A);");
    for a in [
        "use crate::b::B; pub struct A;",
        "use crate::B; pub struct A;",
        "use crate::*; pub struct A; fn f(_: crate::B) {}",
        "pub struct A; fn f() { crate::b::B::new(); }",
        "pub struct A; fn f() { vec![super::b::B::new()]; }",
        "use super::b; pub struct A; fn f(_: b::B) {}",
        "pub struct A; mod inline { use super::super::b::B; }",
    ] {
        let cycle = cycle_of(&[root, ("a/mod.rs", a), b]);
        assert!(cycle.is_some_and(|cycle| cycle.len() == 3), "{a}");
    }
    let three = [
        ("lib.rs", "mod a; mod b; mod c;"),
        ("a/mod.rs", "use crate::b::B;"),
        ("b/mod.rs", "use crate::c::C; pub struct B;"),
        ("c/mod.rs", "pub mod inner; pub use inner::C;"),
        ("c/inner.rs", "use crate::a; pub struct C;"),
    ];
    assert_eq!(cycle_of(&three).unwrap(), ["a/mod.rs", "b/mod.rs", "c/inner.rs", "a/mod.rs"]);
}

#[test]
fn cycles_are_not_seen_in_one_folder_in_tests_nor_in_declarations() {
    let files = [
        ("lib.rs", "mod a; mod b; mod c; pub use b::B;"),
        ("a/mod.rs", "mod one; mod two; pub struct A; #[cfg(test)] mod tests { use crate::b::B; }"),
        ("a/one.rs", "use super::two::Two; pub struct One;"),
        ("a/two.rs", "use super::one::One; pub struct Two;"),
        ("c.rs", "mod inner; pub struct C;"),
        ("c/inner.rs", "use super::C; pub(in super::super) struct Inner;"),
        ("b/mod.rs", "use crate::a::A; pub struct B; #[cfg(test)] mod tests;"),
        ("b/tests.rs", "use crate::a::A;"),
    ];
    assert_eq!(cycle_of(&files), None);
}
