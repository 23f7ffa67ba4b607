//! What Cargo does not hold of "imports point down": the layers within one crate. Between crates the compiler
//! holds it: a crate sees only those that its `Cargo.toml` names.

use super::hold;
use super::source::{Source, file};

/// The files that declare the modules of a crate in layers. The others have no walls inside.
const ROOTS: [&str; 5] = [
    "crates/core/src/lib.rs",
    "crates/sys/src/lib.rs",
    "crates/cache/src/lib.rs",
    "crates/image/src/lib.rs",
    "src/main.rs",
];

/// Modules that stand side by side in a crate.
struct Layer {
    modules: Vec<String>,
    /// Whether they may use each other.
    open: bool,
}

/// The layers of a crate, the lowest first: its root declares each as a group of `mod` lines.
fn layers(root: &Source) -> Vec<Layer> {
    let groups = root.text.split("\n\n").map(|group| {
        let module = |line: &str| {
            let line = line.trim_start_matches("pub ");
            Some(line.strip_prefix("mod ")?.strip_suffix(';')?.to_owned())
        };
        Layer {
            modules: group.lines().filter_map(module).collect(),
            open: group.contains("may use each other"),
        }
    });
    groups.filter(|layer| !layer.modules.is_empty()).collect()
}

/// The layer that a module is in, by its position.
fn position(layers: &[Layer], module: &str) -> Option<usize> {
    let mut all = layers.iter();
    all.position(|layer| layer.modules.iter().any(|name| name == module))
}

/// The top module of a crate that a file belongs to: `client` for `crates/cache/src/client/probe.rs`.
fn top_module<'a>(file: &'a Source, folder: &str) -> Option<&'a str> {
    file.name.strip_prefix(folder)?.split(['/', '.']).next()
}

/// The modules of its own crate that a file names by `crate::x`, `crate::{x, …}`, or by `super::` up to the root.
fn imports(file: &Source, folder: &str) -> Vec<String> {
    let code = file.code();
    let word = |text: &str| {
        text.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect::<String>()
    };
    let mut names = Vec::new();
    for (at, root) in code.match_indices("crate::") {
        let rest = &code[at + root.len()..];
        match rest.strip_prefix('{') {
            Some(group) => names.extend(group_heads(group)),
            None => names.push(word(rest)),
        }
    }
    // `x.rs` and `x/mod.rs` are one step from the root, `x/y.rs` is two.
    let below = file.name.strip_prefix(folder).unwrap_or_default();
    let path = below.trim_end_matches(".rs").trim_end_matches("/mod");
    let steps = "super::".repeat(path.split('/').count());
    for (at, _) in code.match_indices(&steps) {
        // In a module of tests, one `super` less goes to the same place.
        if at < file.product_code().len() {
            names.push(word(&code[at + steps.len()..]));
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// The first names in `a, b::c, d::{e, f}}`.
fn group_heads(group: &str) -> Vec<String> {
    let mut heads = vec![String::new()];
    let mut depth = 0;
    let mut in_head = true;
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                heads.push(String::new());
                in_head = true;
            }
            c if c.is_alphanumeric() || c == '_' => {
                if in_head && depth == 0 {
                    heads.last_mut().unwrap().push(c);
                }
            }
            c if c.is_whitespace() => {}
            _ => in_head = false,
        }
    }
    heads
}

fn imports_point_down(files: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for root in ROOTS {
        let layers = layers(&file(root));
        let folder = &root[..=root.rfind('/').unwrap()];
        for file in files.iter().filter(|file| file.name != root) {
            let Some(own) = top_module(file, folder) else {
                continue;
            };
            let Some(at) = position(&layers, own) else {
                complaints.push(format!("{}: {root} declares no `{own}`", file.name));
                continue;
            };
            for name in imports(file, folder) {
                match position(&layers, &name) {
                    _ if name == own => {}
                    Some(other) if other < at => {}
                    Some(other) if other == at && layers[at].open => {}
                    Some(_) => complaints.push(format!(
                        "{}: `{own}` must not use `{name}`, which stands beside it or above it in {root}",
                        file.name
                    )),
                    // Not a module: an item of the root.
                    None => {}
                }
            }
        }
    }
    complaints
}

#[test]
fn every_import_within_a_crate_points_down() {
    let planted = [
        ("crates/cache/src/server/x.rs", "use crate::client::probe;"),
        (
            "crates/cache/src/client/x.rs",
            "use crate::{client::probe, server};",
        ),
        (
            "crates/core/src/text.rs",
            "fn f() { crate::trust::decide() }",
        ),
        ("crates/core/src/budget.rs", "use crate::trust;"),
        ("crates/sys/src/http.rs", "use super::host;"),
        (
            "crates/sys/src/http/x.rs",
            "fn f() { super::super::runner::f() }",
        ),
        ("crates/core/src/misc.rs", ""),
        ("crates/image/src/size.rs", "use crate::sizing::decide;"),
        ("crates/image/src/history.rs", "use crate::rawjson::Build;"),
        ("src/report/x.rs", "use crate::command::Failure;"),
        ("src/inputs/x.rs", "use crate::report::job::Outcome;"),
        ("src/job/x.rs", "use crate::{inputs, command::setup};"),
    ];
    let planted: Vec<_> = planted
        .iter()
        .map(|(name, text)| Source::planted(name, text))
        .collect();
    hold(imports_point_down, super::product(), &planted);
    assert_eq!(
        group_heads("a, b::c, d::{e, f::g}, h};"),
        ["a", "b", "d", "h"]
    );
}

#[test]
fn the_ground_and_the_rules_cannot_wait_or_ask() {
    let rule = |files: &[Source]| {
        let mut complaints = Vec::new();
        let banned = [
            "tokio",
            "reqwest",
            "hyper",
            "octocrab",
            "rustix",
            "tempfile",
            "which",
            "rusqlite",
            "flywheel-",
        ];
        for file in files {
            let (_, listed) = file.text.split_once("[dependencies]").unwrap_or_default();
            for line in listed.lines().take_while(|line| !line.starts_with('[')) {
                if banned.iter().any(|name| line.starts_with(name)) {
                    complaints.push(format!(
                        "{}: `{line}`: a rule is a pure decision",
                        file.name
                    ));
                }
            }
        }
        complaints
    };
    let planted = [
        Source::planted(
            "crates/core/Cargo.toml",
            "[dependencies]\ntokio.workspace = true\n",
        ),
        Source::planted(
            "crates/core/Cargo.toml",
            "[dependencies]\nflywheel-sys.workspace = true\n",
        ),
    ];
    hold(rule, vec![file("crates/core/Cargo.toml")], &planted);
}
