//! The snippets of a page: what stands between fences, and how it is tested.
//!
//! Every snippet of YAML, shell and Nix is validated by the fast suite. The real suite runs shell, evaluates Nix, and runs
//! under act the workflows that are marked with `<!-- test: act -->` in the line above. A snippet that nothing runs says
//! so in the line below, with one of `REASONS`.

/// Why a snippet is not run; a page shows it to its readers.
pub const REASONS: [&str; 3] = [
    "*No test runs this: it needs GitHub itself.*",
    "*No test runs this: it changes the whole machine.*",
    "*No test runs this: it takes minutes.*",
];

/// The languages of snippets, and of what is shown only.
pub const LANGUAGES: [&str; 9] = [
    "sh",
    "yaml",
    "nix",
    "ini",
    "dockerfile",
    "json",
    "text",
    "console",
    "html",
];

/// How a page asks for a test of its own: `act` runs a workflow, and a machine of `tests/machines` runs what is marked
/// `machine`.
pub const MARKS: [&str; 2] = ["act", "machine"];

#[derive(Clone, Debug)]
pub struct Fence {
    pub page: String,
    /// The line of the opening fence.
    pub line: usize,
    pub language: String,
    /// The word of the comment above it.
    pub mark: Option<String>,
    /// The line below it, if that says that no test runs it.
    pub reason: Option<String>,
    pub text: String,
}

impl Fence {
    /// Where it is, for a message.
    pub fn place(&self) -> String {
        format!("{}:{}", self.page, self.line)
    }
}

/// Every fence of a page, in order.
pub fn fences(page: &str, markdown: &str) -> Vec<Fence> {
    let lines: Vec<&str> = markdown.lines().collect();
    let mut found = Vec::new();
    let mut at = 0;
    while at < lines.len() {
        let Some(language) = lines[at].trim_start().strip_prefix("```") else {
            at += 1;
            continue;
        };
        let indent = lines[at].len() - lines[at].trim_start().len();
        let length = lines[at + 1..]
            .iter()
            .position(|line| line.trim() == "```")
            .unwrap_or_else(|| panic!("{page}:{}: the fence has no end", at + 1));
        let body = &lines[at + 1..at + 1 + length];
        let above = at.checked_sub(1).map_or("", |above| lines[above].trim());
        let below = lines[at + 2 + length..]
            .iter()
            .map(|line| line.trim())
            .find(|line| !line.is_empty());
        found.push(Fence {
            page: page.to_owned(),
            line: at + 1,
            language: language.trim().to_owned(),
            mark: above
                .strip_prefix("<!-- test: ")
                .and_then(|mark| mark.strip_suffix(" -->"))
                .map(str::to_owned),
            reason: below
                .filter(|line| line.starts_with("*No test runs this"))
                .map(str::to_owned),
            text: body
                .iter()
                .map(|line| format!("{}\n", line.get(indent..).unwrap_or_default()))
                .collect(),
        });
        at += 2 + length;
    }
    found
}
