//! The Nix expressions that evaluate a flake: one lists its outputs, another computes their
//! derivations. Pure text; other modules run it.
//!
//! **Evaluation memory rests on `SelfView::AbortOnUse`.** The flake's `outputs` are called as Nix
//! calls them (`call-flake.nix`), but every attribute of `self`'s source information aborts the
//! evaluation when its value is used, by `builtins.abort`, which `builtins.tryEval` does not catch.
//! The attribute names stay the same, since a flake may test for them (`self ? rev`). An evaluation
//! that succeeds this way does not depend on the commit, only on the source tree, the attribute
//! names and Nix itself.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::flake::{Source, system};

/// The path of a derivation below the selected attribute.
pub type AttributePath = Vec<String>;

/// How the flake sees its own source information.
#[derive(Clone, Debug, PartialEq)]
pub enum SelfView {
    /// As Nix provides it for `nix eval FLAKE#ATTRIBUTE`.
    Installable,
    /// With these values.
    Real(BTreeMap<String, Value>),
    /// With these attribute names; using any value aborts the evaluation.
    AbortOnUse(Vec<String>),
}

/// Follows the nonce in the error of an evaluation that used such a value.
const ABORT_SUFFIX: &str = "-commit-";
/// Attributes of a source that depend on the tree alone, not on the commit.
pub(crate) const TREE_ATTRIBUTES: [&str; 3] = ["outPath", "narHash", "submodules"];

/// The function that lists every attribute of every system that is asked for. It stands behind `wanted`, a list of systems
/// or null for all; `within`, the names that lead to the selected attribute; and `system`, the pattern of a system's name.
///
/// Whether an attribute set is divided by systems is decided from names, so that no value is evaluated: `checks` has
/// systems, and `checks.x86_64-linux` has none, even if an output of it has the name of one. Nothing of a system that is
/// not asked for is evaluated either, because it may throw, or need a machine of that system.
const LIST: &str = r#"selected: let
  isSystem = name: builtins.match system name != null;
  names = builtins.attrNames selected;
  ofSystem = one: if wanted == null || builtins.elem one wanted
    then
      if (selected.${one}.type or null) == "derivation"
      then [ { attr = [ one ]; label = one; } ]
      else map (name: { attr = [ one name ]; label = "${one}.${name}"; }) (builtins.attrNames selected.${one})
    else [ { notLookedAt = one; } ];
in if names != [ ] && builtins.all isSystem names && !(builtins.any isSystem within)
  then builtins.concatMap ofSystem names
  else map (name: { attr = [ name ]; label = name; }) names"#;

/// The expressions for one flake.
#[derive(Clone, Debug)]
pub struct Expressions {
    source: Source,
    attribute: AttributePath,
    nonce: String,
}

impl Expressions {
    /// Creates the expressions. `nonce` marks our lines among the flake's own output and must be
    /// new for each run.
    pub fn new(source: &Source, attribute: &[String], nonce: &str) -> Self {
        Self {
            source: source.clone(),
            attribute: attribute.to_owned(),
            nonce: nonce.to_owned(),
        }
    }

    /// The prefix of each line that we trace.
    pub(crate) fn mark(&self) -> String {
        format!("trace: {}", self.nonce)
    }

    /// The text that the error contains when a value of `SelfView::AbortOnUse` was used.
    pub(crate) fn abort_marker(&self) -> String {
        format!("{}{ABORT_SUFFIX}", self.nonce)
    }

    /// Arguments of `nix` that print the list of `{ attr, label }` as JSON. `function` is the
    /// user's own; ours lists the outputs of these systems alone, and names the others as `{ notLookedAt }`.
    pub(crate) fn list_args(
        &self,
        view: &SelfView,
        function: Option<&str>,
        systems: Option<&[String]>,
    ) -> Vec<String> {
        let function = match function {
            Some(function) => format!("({function})"),
            None => {
                let wanted = serde_json::json!(systems).to_string();
                let wanted = nix_string(&wanted);
                let within = nix_string(&serde_json::json!(self.attribute).to_string());
                let system = nix_string(&system::pattern());
                format!(
                    "(let wanted = builtins.fromJSON {wanted}; within = builtins.fromJSON {within}; system = {system}; \
                     in {LIST})"
                )
            }
        };
        let mut args = self.eval_args(view, &function);
        args.push("--json".to_owned());
        args
    }

    /// Arguments of `nix` that trace a line when each attribute begins, and another with its
    /// derivation.
    pub(crate) fn derivation_args(
        &self,
        view: &SelfView,
        attributes: &[(usize, &AttributePath)],
        read_only: bool,
    ) -> Vec<String> {
        let list: Vec<Value> = attributes
            .iter()
            .map(|(id, path)| serde_json::json!({ "i": id, "p": path }))
            .collect();
        // Lazy evaluation decides the order of the lines: the first `say` runs before the
        // derivation is forced, the second after it.
        let function = format!(
            r#"(selected: let
  say = value: builtins.trace ({mark} + builtins.toJSON value);
  plain = text: builtins.unsafeDiscardStringContext "${{text}}";
  look = path: builtins.foldl' (set: name: set.${{name}}) selected path;
  facts = d: if !(builtins.isAttrs d && (d.type or null) == "derivation") then throw "it is not a derivation" else {{
    drv = plain d.drvPath;
    outs = builtins.listToAttrs (map (name: {{ inherit name; value = plain (d.${{name}}.outPath or d.outPath); }}) (d.outputs or [ "out" ]));
    system = d.system or null;
  }};
  one = a: let found = facts (look a.p); in say {{ b = a.i; }} (builtins.deepSeq found (say {{ d = a.i; f = found; }} 0));
in builtins.foldl' (n: a: builtins.seq (one a) n) 0 (builtins.fromJSON {list}))"#,
            mark = nix_string(&self.nonce),
            list = nix_string(&Value::from(list).to_string()),
        );
        let mut args = self.eval_args(view, &function);
        // Derivations are then computed but not written to the store.
        if read_only {
            args.push("--read-only".to_owned());
        }
        args
    }

    fn eval_args(&self, view: &SelfView, function: &str) -> Vec<String> {
        match view {
            SelfView::Installable => {
                let installable = installable(&self.source.reference, &self.attribute)
                    .expect("`attribute_path` gives no other names");
                [
                    "eval".to_owned(),
                    "--no-write-lock-file".to_owned(),
                    installable,
                    "--apply".to_owned(),
                    function.to_owned(),
                ]
                .into()
            }
            // `--expr` needs no installable; the source is named inside the expression.
            _ => [
                "eval".to_owned(),
                "--expr".to_owned(),
                format!("{} ({})", function, self.selected(view)),
            ]
            .into(),
        }
    }

    /// The expression for the selected attribute of a flake that sees itself as given.
    fn selected(&self, view: &SelfView) -> String {
        // Merged over the attributes of the tree, which are always real.
        let info = match view {
            SelfView::Installable => "{ }".to_owned(),
            SelfView::Real(values) => {
                let values: serde_json::Map<String, Value> = values.clone().into_iter().collect();
                format!(
                    "builtins.fromJSON {}",
                    nix_string(&Value::from(values).to_string())
                )
            }
            SelfView::AbortOnUse(names) => format!(
                "builtins.listToAttrs (map (name: {{ inherit name; value = builtins.abort ({} + name); }}) (builtins.fromJSON {}))",
                nix_string(&self.abort_marker()),
                nix_string(&Value::from(names.clone()).to_string()),
            ),
        };
        let attribute: String = self
            .attribute
            .iter()
            .map(|name| format!(".{}", nix_string(name)))
            .collect();
        format!(
            r#"let
  real = builtins.getFlake {reference};
  kept = builtins.intersectAttrs {{ outPath = 0; narHash = 0; submodules = 0; }} real.sourceInfo;
  info = kept // {info};
  outputs = (import (real.outPath + "/flake.nix")).outputs (real.inputs // {{ inherit self; }});
  self = outputs // info // {{ inherit (real) outPath inputs; inherit outputs; sourceInfo = info; _type = "flake"; }};
in self{attribute}"#,
            reference = nix_string(&self.by_path()),
        )
    }

    /// The source as a locked reference to its tree in the store.
    fn by_path(&self) -> String {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        // The hash makes the reference locked, which pure evaluation requires.
        query.append_pair("narHash", &self.source.nar_hash);
        if !self.source.folder.is_empty() {
            query.append_pair("dir", &self.source.folder);
        }
        format!("path:{}?{}", self.source.path.display(), query.finish())
    }

    /// Arguments of `nix` that print, as JSON, the source information that Nix gives to the flake.
    /// Impure, because the source may be a tree with uncommitted changes; nothing of the flake is
    /// evaluated.
    pub(crate) fn source_info_args(&self) -> Vec<String> {
        let expression = format!(
            "builtins.removeAttrs (builtins.getFlake {}).sourceInfo [ \"outPath\" ]",
            nix_string(&self.source.url)
        );
        ["eval", "--impure", "--json", "--expr", &expression]
            .map(str::to_owned)
            .into()
    }
}

/// Quotes a text as a Nix string.
fn nix_string(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            // An unescaped `$` could begin an interpolation.
            '"' | '\\' | '$' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Returns the installable of an attribute of a flake, such as `.#checks."a%7Cb"`; `None` if Nix has no way to write one
/// of the names, because it is empty or holds a quote.
pub fn installable(reference: &str, path: &[String]) -> Option<String> {
    let names: Option<Vec<String>> = path.iter().map(|name| fragment_name(name)).collect();
    Some(format!("{reference}#{}", names?.join(".")))
}

/// A name in the fragment of a flake reference, quoted and percent-encoded where needed.
fn fragment_name(name: &str) -> Option<String> {
    // Nix's identifiers may contain `-` and `'`, but not begin with them.
    let plain = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_-'".contains(c));
    if plain {
        return Some(name.to_owned());
    }
    if name.is_empty() || name.contains('"') {
        return None;
    }
    // Nix decodes the fragment before it reads the path, and refuses it where it holds a character that no URL has.
    let mut quoted = String::from("\"");
    for byte in name.bytes() {
        // The characters that mean themselves everywhere in a URL (RFC 3986, 2.3).
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            quoted.push(char::from(byte));
        } else {
            quoted.push_str(&format!("%{byte:02X}"));
        }
    }
    quoted.push('"');
    Some(quoted)
}

/// The command that builds an attribute of a flake by hand, for a shell.
pub fn build_command(reference: &str, path: &[String]) -> String {
    // Only text with a NUL cannot be quoted, and Nix's strings hold none.
    let quote = |text: &str| shlex::try_quote(text).unwrap_or_default().into_owned();
    if let Some(whole) = installable(reference, path) {
        return format!("nix build {}", quote(&whole));
    }
    // A function reaches the names that cannot be written behind the `#`.
    let written = path
        .iter()
        .take_while(|name| fragment_name(name).is_some())
        .count();
    let parent = installable(reference, &path[..written]).unwrap_or_default();
    let rest: String = path[written..]
        .iter()
        .map(|name| format!(".{}", nix_string(name)))
        .collect();
    format!(
        "nix-store --realise \"$(nix eval --raw {} --apply {})\"",
        quote(&parent),
        quote(&format!("set: set{rest}.drvPath"))
    )
}

/// Splits `checks.x86_64-linux."a.b"` into its names; `None` for anything else.
pub fn attribute_path(text: &str) -> Option<AttributePath> {
    let mut names = Vec::new();
    let mut rest = text;
    loop {
        let (name, after) = match rest.strip_prefix('"') {
            // A quoted name may contain dots.
            Some(quoted) => quoted.split_once('"')?,
            None => rest.split_at(rest.find(['.', '"']).unwrap_or(rest.len())),
        };
        let odd = |c: char| c.is_control() || c.is_whitespace() || "#$\"\\{}()".contains(c);
        if name.is_empty() || name.contains(odd) {
            return None;
        }
        names.push(name.to_owned());
        match after.strip_prefix('.') {
            Some(more) => rest = more,
            None => return after.is_empty().then_some(names),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attribute_paths_are_read_as_nix_writes_them() {
        let read = |text: &str| attribute_path(text).map(|names| names.join("|"));
        assert_eq!(read("checks").as_deref(), Some("checks"));
        assert_eq!(
            read("checks.x86_64-linux").as_deref(),
            Some("checks|x86_64-linux")
        );
        assert_eq!(read("a.\"b.c\".d").as_deref(), Some("a|b.c|d"));
        for wrong in [
            "", ".", "a.", ".a", "a..b", "a b", "a.\"b", "a\"b\"", "a.\"b\"c", "${x}", "a#b",
            "a.\"\"",
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn an_installable_can_be_written_for_every_name_but_two_kinds() {
        let of = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            (installable(".", &names), build_command(".", &names))
        };
        for (name, written) in [
            ("hello", ".#c.hello"),
            ("x'", ".#c.x'"),
            ("a.b", ".#c.\"a.b\""),
            ("1st", ".#c.\"1st\""),
            ("a|b", ".#c.\"a%7Cb\""),
            ("per%20cent", ".#c.\"per%2520cent\""),
            ("^ü\n", ".#c.\"%5E%C3%BC%0A\""),
        ] {
            let (installable, command) = of(&["c", name]);
            assert_eq!(installable.as_deref(), Some(written));
            let words = shlex::split(&command).expect("whole words");
            assert_eq!(words, ["nix", "build", written]);
        }
        for (names, inner) in [
            (
                ["c", "a\"b"],
                r#"nix eval --raw '.#c' --apply "set: set.\"a\\\"b\".drvPath""#,
            ),
            (
                ["c", ""],
                "nix eval --raw '.#c' --apply 'set: set.\"\".drvPath'",
            ),
        ] {
            let (installable, command) = of(&names);
            assert_eq!(installable, None);
            assert_eq!(command, format!("nix-store --realise \"$({inner})\""));
        }
    }

    #[test]
    fn no_text_leaves_its_string() {
        assert_eq!(nix_string("a\"b\\${c}\n"), r#""a\"b\\\${c}\n""#);
    }
}
