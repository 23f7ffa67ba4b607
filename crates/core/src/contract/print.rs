//! The contract as text for a terminal and as Markdown for a page, from the same tables.

use std::fmt::Write as _;

use crate::contract::{Cache, Contract, Lane, Skill};

/// A part of the contract that can be printed alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// Classes and their lanes.
    Classes,
    /// Caches.
    Caches,
    /// What goes where.
    Placement,
    /// What happens on a miss.
    OnMiss,
    /// Who may reach what.
    Exposure,
    /// What is published, and when.
    Publication,
    /// The shared-cache contract for Bazel.
    SharedCache,
}

impl Section {
    /// Every section by its name, in order.
    pub const ALL: [(&str, Self); 7] = [
        ("classes", Self::Classes),
        ("caches", Self::Caches),
        ("placement", Self::Placement),
        ("on-miss", Self::OnMiss),
        ("exposure", Self::Exposure),
        ("publication", Self::Publication),
        ("shared-cache", Self::SharedCache),
    ];

    fn blocks(self, contract: &Contract) -> Vec<Block> {
        match self {
            Self::Classes => vec![
                Block::Title("Builder classes"),
                classes(contract),
                Block::Title("Lanes"),
                lanes(contract),
                Block::Title("Tools"),
                tools(contract),
            ],
            Self::Caches => vec![Block::Title("Caches"), caches(contract)],
            Self::Placement => vec![Block::Title("What goes where"), placement(contract)],
            Self::OnMiss => vec![Block::Title("On a miss"), on_miss(contract)],
            Self::Exposure => vec![Block::Title("Exposure"), exposure(contract)],
            Self::Publication => vec![
                Block::Title("Publication"),
                Block::Text("A thing is publishable if:"),
                Block::List(contract.publication.publishable.clone()),
                triggers(contract),
                Block::List(contract.publication.rules.clone()),
            ],
            Self::SharedCache => vec![
                Block::Title("The shared cache of Bazel"),
                shared_cache(contract),
            ],
        }
    }
}

enum Block {
    Title(&'static str),
    Text(&'static str),
    List(Vec<String>),
    Table(Vec<&'static str>, Vec<Vec<String>>),
    /// A table of the contract.
    Free(Vec<String>, Vec<Vec<String>>),
}

/// The contract, or a section of it, as Markdown.
pub fn markdown(contract: &Contract, section: Option<Section>) -> String {
    let mut text = String::new();
    if section.is_none() {
        text.push_str("# The builder contract\n");
    }
    let escape = |cell: &str| cell.replace('|', "\\|");
    for block in blocks(contract, section) {
        match block {
            Block::Title(title) => push(&mut text, format_args!("\n## {title}\n")),
            Block::Text(line) => push(&mut text, format_args!("\n{line}\n")),
            Block::List(items) => {
                text.push('\n');
                items
                    .iter()
                    .for_each(|item| push(&mut text, format_args!("- {}\n", item.trim())));
            }
            Block::Table(head, rows) => table(&mut text, &head.map_owned(), &rows, escape),
            Block::Free(head, rows) => table(&mut text, &head, &rows, escape),
        }
    }
    text.trim_start().to_owned()
}

fn table(
    text: &mut String,
    head: &[String],
    rows: &[Vec<String>],
    escape: impl Fn(&str) -> String,
) {
    push(
        text,
        format_args!(
            "\n| {} |\n|{}\n",
            head.join(" | "),
            "---|".repeat(head.len())
        ),
    );
    for row in rows {
        let cells: Vec<String> = row.iter().map(|cell| escape(cell)).collect();
        push(text, format_args!("| {} |\n", cells.join(" | ")));
    }
}

/// The contract, or a section of it, as text: tables become a paragraph for each row.
pub fn text(contract: &Contract, section: Option<Section>) -> String {
    let mut text = String::new();
    for block in blocks(contract, section) {
        match block {
            Block::Title(title) => push(&mut text, format_args!("\n{}\n", title.to_uppercase())),
            Block::Text(line) => push(&mut text, format_args!("\n  {line}\n")),
            Block::List(items) => {
                text.push('\n');
                items
                    .iter()
                    .for_each(|item| push(&mut text, format_args!("  - {}\n", item.trim())));
            }
            Block::Table(head, rows) => paragraphs(&mut text, &head.map_owned(), &rows),
            Block::Free(head, rows) => paragraphs(&mut text, &head, &rows),
        }
    }
    text.trim_start().to_owned()
}

fn paragraphs(text: &mut String, head: &[String], rows: &[Vec<String>]) {
    let width = head
        .iter()
        .skip(1)
        .map(|name| name.chars().count())
        .max()
        .unwrap_or_default();
    for row in rows {
        push(text, format_args!("\n  {}\n", row[0]));
        for (name, cell) in head
            .iter()
            .zip(row)
            .skip(1)
            .filter(|(_, cell)| !cell.is_empty())
        {
            push(text, format_args!("    {name:<width$}  {cell}\n"));
        }
    }
}

fn push(text: &mut String, line: std::fmt::Arguments<'_>) {
    text.write_fmt(line).expect("a `String` takes everything");
}

fn blocks(contract: &Contract, section: Option<Section>) -> Vec<Block> {
    let sections = Section::ALL.into_iter().map(|(_, one)| one);
    sections
        .filter(|one| section.is_none_or(|wanted| wanted == *one))
        .flat_map(|one| one.blocks(contract))
        .collect()
}

trait MapOwned {
    fn map_owned(&self) -> Vec<String>;
}

impl MapOwned for Vec<&'static str> {
    fn map_owned(&self) -> Vec<String> {
        self.iter().map(|name| (*name).to_owned()).collect()
    }
}

fn names(skills: &[Skill]) -> String {
    skills
        .iter()
        .map(|skill| skill.as_str())
        .collect::<Vec<_>>()
        .join(", ")
}

fn classes(contract: &Contract) -> Block {
    let head = vec![
        "class",
        "runner lane",
        "image",
        "capabilities",
        "provides",
        "used for",
    ];
    let rows = contract.classes.iter().map(|(name, class)| {
        let lane = class.lanes().first();
        let lane = lane.map(|lane| match &lane.runner {
            Some(runner) => format!("`{runner}` (label `{}`)", lane.label),
            None => format!("`{}`", lane.label),
        });
        let mut can = class.capabilities.clone().unwrap_or_default();
        if let Some(most) = class.lanes().first().and_then(|lane| lane.max_runners) {
            can.push(format!("at most {most} runners at once"));
        }
        vec![
            format!("`{name}`"),
            lane.unwrap_or_default(),
            class.image.clone().unwrap_or_default(),
            can.join(", "),
            names(class.provides.as_deref().unwrap_or_default()),
            class.used_for.clone().unwrap_or_default().join(", "),
        ]
    });
    Block::Table(head, rows.collect())
}

fn lanes(contract: &Contract) -> Block {
    let head = vec![
        "lane",
        "class",
        "memory",
        "runners at most",
        "publishes",
        "provides besides",
        "note",
    ];
    let rows = contract.lanes().map(|(name, class, lane)| {
        vec![
            format!("`{}`", lane.label),
            format!("`{name}`"),
            class
                .memory(Some(lane))
                .map(|size| size.to_string())
                .unwrap_or_default(),
            lane.max_runners
                .map(|most| most.to_string())
                .unwrap_or_default(),
            publishes(lane).to_owned(),
            names(&lane.provides),
            lane.note.clone().unwrap_or_default(),
        ]
    });
    Block::Table(head, rows.collect())
}

fn publishes(lane: &Lane) -> &'static str {
    if lane.publishes {
        "if the trust gate allows"
    } else {
        "never, reads only"
    }
}

fn tools(contract: &Contract) -> Block {
    let head = vec!["tool", "class", "versions"];
    let rows = contract.classes.iter().flat_map(|(name, class)| {
        let tools = class.tools.iter();
        tools.map(move |(tool, wanted)| {
            vec![
                format!("`{tool}`"),
                format!("`{name}`"),
                format!("`{wanted}`"),
            ]
        })
    });
    Block::Table(head, rows.collect())
}

fn title<'a>(name: &'a str, cache: &'a Cache) -> &'a str {
    cache.title.as_deref().unwrap_or(name)
}

fn caches(contract: &Contract) -> Block {
    let head = vec![
        "cache",
        "authority",
        "content",
        "consumers",
        "filled by",
        "credential",
    ];
    let rows = contract.caches.iter().map(|(name, cache)| {
        let fields = [
            &cache.authority,
            &cache.content,
            &cache.consumers,
            &cache.filled_by,
            &cache.credential,
        ];
        let fields = fields.map(|field| field.clone().unwrap_or_default());
        std::iter::once(title(name, cache).to_owned())
            .chain(fields)
            .collect()
    });
    Block::Table(head, rows.collect())
}

fn named(contract: &Contract, cache: &str) -> String {
    contract
        .caches
        .get(cache)
        .map_or(cache, |known| title(cache, known))
        .to_owned()
}

fn placement(contract: &Contract) -> Block {
    let rows = contract
        .placement
        .iter()
        .map(|row| vec![row.what.clone(), named(contract, &row.cache)]);
    Block::Table(vec!["what", "where"], rows.collect())
}

fn on_miss(contract: &Contract) -> Block {
    let rows = contract.caches.iter().filter_map(|(name, cache)| {
        let costs = cache.on_miss_costs.clone().unwrap_or_default();
        cache
            .on_miss
            .clone()
            .map(|does| vec![title(name, cache).to_owned(), does, costs])
    });
    Block::Table(
        vec!["cache", "what happens", "what it costs"],
        rows.collect(),
    )
}

fn exposure(contract: &Contract) -> Block {
    let mut columns: Vec<&str> = Vec::new();
    for (_, row) in contract.exposure.iter() {
        let new: Vec<&str> = row
            .iter()
            .map(|(cache, _)| cache)
            .filter(|cache| !columns.contains(cache))
            .collect();
        columns.extend(new);
    }
    let head = std::iter::once("consumer".to_owned())
        .chain(columns.iter().map(|cache| named(contract, cache)));
    let rows = contract.exposure.iter().map(|(consumer, row)| {
        let cells = columns
            .iter()
            .map(|cache| row.get(cache).map(ToString::to_string).unwrap_or_default());
        std::iter::once(consumer.to_owned()).chain(cells).collect()
    });
    Block::Free(head.collect(), rows.collect())
}

fn triggers(contract: &Contract) -> Block {
    let rows = contract.publication.triggers.iter();
    let rows = rows.map(|row| vec![row.event.clone(), row.flakehub.clone(), row.attic.clone()]);
    Block::Table(vec!["event", "FlakeHub", "Attic"], rows.collect())
}

fn shared_cache(contract: &Contract) -> Block {
    let declared = &contract.shared_cache;
    let allowed = |allowed: Option<bool>| {
        if allowed.unwrap_or_default() {
            "yes"
        } else {
            "no"
        }
        .to_owned()
    };
    let rows = vec![
        vec![
            "mode".to_owned(),
            declared
                .mode
                .map(|mode| mode.as_str().to_owned())
                .unwrap_or("not declared".to_owned()),
        ],
        vec!["schemes".to_owned(), declared.schemes().join(", ")],
        vec![
            "an endpoint on the machine itself".to_owned(),
            allowed(declared.allow_localhost),
        ],
        vec![
            "an executor elsewhere than the cache".to_owned(),
            allowed(declared.allow_separate_executor),
        ],
    ];
    Block::Table(vec!["what", "allowed or declared"], rows)
}
