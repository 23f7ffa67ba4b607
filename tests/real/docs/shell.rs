//! The shell snippets of each page: one after the other, in a folder where a reader would be, with a cache to publish to.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::fences::Fence;
use super::{flake, pages};
use crate::world::cache::Cache;
use crate::world::port::Port;
use crate::world::{PATH, flywheel, folders, must, need, root, with_private_nix};

/// Runs the snippets `0.sh`, `1.sh`, … of a page. One that ends in a server is left running until the next one that does.
/// Prints what each of them printed, and ends with 1 after the first that fails.
const WALK: &str = r#"
server=
stop() {
  [ -z "$server" ] || { kill -- "-$server" && wait "$server"; } 2>/dev/null
  server=
}
trap stop EXIT
number=0
while [ -e "$SNIPPETS/$number.sh" ]; do
  snippet=$SNIPPETS/$number.sh
  echo "--- $(cat "$SNIPPETS/$number.place")"
  if grep -q 'flywheel cache serve' "$snippet"; then
    stop
    setsid sh -eu "$snippet" >"$SNIPPETS/server.log" 2>&1 &
    server=$!
    waited=0
    until grep -q '^tokens-file ' "$SNIPPETS/server.log"; do
      waited=$((waited + 1))
      [ $waited -lt 200 ] || { cat "$SNIPPETS/server.log" && exit 1; }
      sleep 0.1
    done
    cat "$SNIPPETS/server.log"
  else
    timeout 60 sh -eu "$snippet" 2>&1 || { echo "exit code $?" && exit 1; }
  fi
  number=$((number + 1))
done
"#;

/// Pages whose snippets belong to another test, and pages of examples that the fast suite holds against the program.
fn is_walked(fence: &Fence) -> bool {
    let is_script = fence.text.starts_with("#!");
    fence.language == "sh"
        && fence.reason.is_none()
        && fence.mark.is_none()
        && fence.page != "docs/reference.md"
        && !is_script
}

/// Makes the folder that a reader of the pages is in: a repository with a flake, the checkout's binary and examples, a
/// result, and the folder of an embedded cache that has it.
fn prepare(folder: &Path, environment: impl Fn(&mut std::process::Command)) {
    fs::create_dir_all(folder.join("dist")).unwrap();
    symlink(flywheel(), folder.join("dist/flywheel")).unwrap();
    must(
        std::process::Command::new("cp")
            .args(["-r"])
            .args([root().join("examples"), folder.to_owned()]),
    );
    fs::write(folder.join("flake.nix"), flake()).unwrap();
    fs::create_dir_all(folder.join("bin")).unwrap();
    let busybox = need("busybox", "apt-get install busybox-static");
    fs::copy(busybox, folder.join("bin/busybox")).unwrap();
    let git = need("git", "apt-get install git");
    for arguments in [
        vec!["init", "--quiet"],
        vec!["add", "flake.nix", "bin", "examples"],
    ] {
        let mut git = std::process::Command::new(&git);
        environment(&mut git);
        must(git.args(arguments).current_dir(folder));
    }
}

/// What a page has for the reader to fill in, filled in.
fn filled_in(text: &str, cache: &Cache, port: &str, path: &str) -> String {
    [
        ("https://attic.example.org/", format!("{}/", cache.url)),
        ("main:6NCHdD59X431…=", cache.key.clone()),
        ("127.0.0.1:8484", port.to_owned()),
        ("/nix/store/…-nix-2.31.2", path.to_owned()),
    ]
    .iter()
    .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// What is left in the reader's folders, where the reference says nothing of it.
fn undocumented(top: &Path) -> Vec<String> {
    let reference = fs::read_to_string(root().join("docs/reference.md")).unwrap();
    let (_, files) = reference.split_once("## Files").unwrap();
    let below = |folder: &str| {
        let entries = fs::read_dir(top.join(folder)).into_iter().flatten();
        let names = entries.map(|entry| entry.unwrap().file_name());
        names
            .map(|name| name.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
    };
    let mut left = Vec::new();
    for (folder, shown) in [
        ("home/.cache/flywheel", "~/.cache/flywheel"),
        ("home/.local/share/flywheel", "~/.local/share/flywheel"),
        ("state/flywheel", "~/.local/state/flywheel"),
    ] {
        let places = below(folder)
            .into_iter()
            .map(|name| format!("`{shown}/{name}/`"));
        left.extend(places.filter(|place| !files.contains(place)));
    }
    // What is for one run alone is gone with it.
    for folder in ["runtime", "tmp"] {
        let ours = below(folder)
            .into_iter()
            .filter(|name| name.starts_with("flywheel"));
        for name in ours {
            left.extend(below(&format!("{folder}/{name}")));
        }
    }
    left
}

/// Runs the snippets of one page; what they printed.
fn walk(fences: &[&Fence]) -> String {
    let (cache, port) = (Cache::start(&[]), Port::reserve());
    let top = tempfile::tempdir().unwrap();
    let (folder, nix) = (top.path().join("reader"), top.path().join("nix"));
    let token = cache.token.clone();
    let environment = |command: &mut std::process::Command| {
        let home = top.path().join("home");
        folders::isolate(command, top.path())
            .env("PATH", format!("{}/.local/bin:{PATH}", home.display()))
            .env("ATTIC_TOKEN", &token);
    };
    prepare(&folder, environment);
    let bin = top.path().join("home/.local/bin");
    fs::create_dir_all(&bin).unwrap();
    symlink(flywheel(), bin.join("flywheel")).unwrap();

    let mut first = with_private_nix(&nix, Path::new("/bin/sh"));
    environment(&mut first);
    let build = "flywheel nix-job --publish --embedded-cache \"$PWD/flywheel-cache\" --command 'nix build .#default' && \
        readlink -f result";
    let printed = must(first.args(["-c", build]).current_dir(&folder));
    let path = printed.lines().last().unwrap_or_default();
    assert!(path.starts_with("/nix/store/"), "{printed}");

    let snippets = top.path().join("snippets");
    fs::create_dir(&snippets).unwrap();
    for (number, fence) in fences.iter().enumerate() {
        let text = filled_in(&fence.text, &cache, &port.address(), path);
        fs::write(snippets.join(format!("{number}.sh")), text).unwrap();
        fs::write(snippets.join(format!("{number}.place")), fence.place()).unwrap();
    }
    let mut shell = with_private_nix(&nix, Path::new("/bin/sh"));
    environment(&mut shell);
    let output = shell
        .args(["-c", WALK])
        .env("SNIPPETS", &snippets)
        .current_dir(&folder)
        .output()
        .unwrap();
    let mut printed = String::from_utf8_lossy(&output.stdout).into_owned();
    printed.push_str(&String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{printed}");
    assert_eq!(undocumented(top.path()), Vec::<String>::new(), "{printed}");
    for line in printed.lines().filter(|line| line.contains(" verified, ")) {
        assert!(line.contains(", 0 lost"), "{printed}");
    }
    printed
}

#[test]
fn every_shell_snippet_does_what_its_page_says() {
    let mut walked = 0;
    for (page, fences) in pages() {
        let fences: Vec<&Fence> = fences.iter().filter(|fence| is_walked(fence)).collect();
        if fences.is_empty() {
            continue;
        }
        walked += fences.len();
        let printed = walk(&fences);
        if page == "docs/start/laptop.md" {
            assert!(printed.contains(" 0 lost"), "{printed}");
        }
    }
    assert!(walked > 15, "only {walked} snippets were run");
}

#[test]
fn a_poisoned_path_goes_with_all_that_refers_to_it_and_nothing_else() {
    let pages = pages();
    let page = pages
        .iter()
        .find(|(name, _)| name == "docs/when-it-goes-wrong.md");
    let fences = &page.expect("the page").1;
    let mut purge = fences
        .iter()
        .find(|fence| fence.text.contains("purge()"))
        .expect("its snippet")
        .clone();
    // The flake's chain is base, lib, app; `lib` is the one that is poisoned. Two are sources.
    purge.text.insert_str(
        0,
        "nix --extra-experimental-features 'nix-command flakes' build .#lib\n",
    );
    let names = "sed -n 's/^StorePath: [^-]*-//p' ./flywheel-cache/caches/main/*.narinfo | sort | tr '\\n' ' '\n";
    purge.text.push_str(names);
    let printed = walk(&[&purge]);
    let left = printed.lines().last().unwrap_or_default();
    assert_eq!(left.trim(), "base bin source", "{printed}");
}

#[test]
fn every_expression_of_nix_and_every_setting_is_one() {
    let top = tempfile::tempdir().unwrap();
    let mut settings = 0;
    for fence in pages().into_iter().flat_map(|(_, fences)| fences) {
        let mut nix = with_private_nix(&top.path().join("nix"), Path::new("/bin/sh"));
        folders::isolate(&mut nix, top.path()).env("PATH", PATH);
        let (script, text) = match fence.language.as_str() {
            "nix" => ("nix-instantiate --parse -E \"$0\"", fence.text.clone()),
            // A unit of systemd begins with a section.
            "ini" if !fence.text.starts_with('[') => {
                settings += 1;
                ("NIX_CONFIG=$0 nix-store --version", fence.text.clone())
            }
            _ => continue,
        };
        let output = nix.args(["-c", script]).arg(&text).output().unwrap();
        let printed = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && !printed.contains("unknown setting"),
            "{}: {printed}",
            fence.place()
        );
    }
    assert!(settings > 0, "no page shows a setting");
}
