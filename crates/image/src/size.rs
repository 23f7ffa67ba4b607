//! The sizes that a runner can have, as data: each with its processors, memory, architecture and price. Chooses among
//! them; which need there is, is decided in `sizing`.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::document::{Field, Record, Shape};

/// The kind of processor that a runner has or an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    Amd64,
    Arm64,
}

impl Architecture {
    /// Every architecture by its platform, as BuildKit names it.
    pub const PLATFORMS: [(&str, Self); 2] =
        [("linux/amd64", Self::Amd64), ("linux/arm64", Self::Arm64)];

    /// The architecture of this machine; `None` where no image is built for it.
    pub fn of_this_machine() -> Option<Self> {
        if cfg!(target_arch = "x86_64") {
            Some(Self::Amd64)
        } else if cfg!(target_arch = "aarch64") {
            Some(Self::Arm64)
        } else {
            None
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Amd64 => "linux/amd64",
            Self::Arm64 => "linux/arm64",
        })
    }
}

/// What a build needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Need {
    pub cpu: u32,
    /// Memory in GB, as the providers count it.
    pub memory_gb: u32,
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} CPU, {} GB", self.cpu, self.memory_gb)
    }
}

/// A size of runners.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    pub name: String,
    pub cpu: u32,
    /// Memory in GB.
    pub memory_gb: u32,
    pub architecture: Architecture,
    /// What an hour costs, in any unit that is the same for all sizes.
    pub price: f64,
}

impl Size {
    pub(crate) fn covers(&self, need: Need) -> bool {
        self.cpu >= need.cpu && self.memory_gb >= need.memory_gb
    }
}

/// The platform that an image is for, and whether another architecture may emulate it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub architecture: Architecture,
    /// The architecture whose runners may emulate it, because somebody asked for that by name.
    pub emulated_on: Option<Architecture>,
}

impl Target {
    /// A target that only its own architecture builds.
    pub fn native(architecture: Architecture) -> Self {
        Self {
            architecture,
            emulated_on: None,
        }
    }

    fn runs_on(self, size: &Size) -> bool {
        size.architecture == self.architecture || Some(size.architecture) == self.emulated_on
    }
}

/// Why no size is chosen.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum NoSize {
    #[error("there is no size `{name}`: the sizes are {known}")]
    Unknown { name: String, known: String },
    #[error("the size `{name}` is {architecture} and the image is for {target}")]
    Foreign {
        name: String,
        architecture: Architecture,
        target: Architecture,
    },
    #[error("no size is {target}: {known}")]
    NoArchitecture { target: Architecture, known: String },
    #[error("no size has {need}: the largest is `{largest}`")]
    TooLarge { need: Need, largest: String },
}

impl NoSize {
    /// What to do, as a sentence.
    pub fn remedy(&self) -> String {
        match self {
            Self::Unknown { .. } => "Name one of them, or give a table that has it.".into(),
            Self::Foreign { architecture, .. } => format!(
                "Name a size of the image's architecture, or ask for emulation by name: `--emulate {architecture}`."
            ),
            Self::NoArchitecture { .. } => {
                "Give a table with sizes of that architecture (`--sizes FILE`), or ask for emulation by name (`--emulate`)."
                    .into()
            }
            Self::TooLarge { .. } => {
                "Give a table with a larger size (`--sizes FILE`), or ask for less.".into()
            }
        }
    }
}

/// The sizes that there are, the smallest first.
#[derive(Clone, Debug, PartialEq)]
pub struct SizeTable(Vec<Size>);

/// A file with sizes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SizesFile {
    pub sizes: Vec<Size>,
}

/// What such a file may hold.
pub const SIZES: Record = Record {
    name: "Sizes",
    about: "The sizes of runners that there are.",
    fields: &[Field {
        name: "sizes",
        shape: Shape::List(&Shape::Record(&SIZE)),
        is_required: true,
        about: "The sizes, in any order.",
    }],
    rules: &[],
};

const SIZE: Record = Record {
    name: "Size",
    about: "A size of runners.",
    fields: &[
        Field {
            name: "name",
            shape: Shape::Name,
            is_required: true,
            about: "What `runner_type` names.",
        },
        Field {
            name: "cpu",
            shape: Shape::Whole(1, 1024),
            is_required: true,
            about: "The number of processors.",
        },
        Field {
            name: "memory_gb",
            shape: Shape::Whole(1, 65_536),
            is_required: true,
            about: "Memory in GB.",
        },
        Field {
            name: "architecture",
            shape: Shape::Choice(&["amd64", "arm64"]),
            is_required: true,
            about: "The kind of processor.",
        },
        Field {
            name: "price",
            shape: Shape::Positive(1_000_000),
            is_required: true,
            about: "What an hour costs, in any unit that is the same for all sizes.",
        },
    ],
    rules: &[],
};

impl Default for SizeTable {
    /// Four sizes of ARM processors. Their price is relative: it doubles with the size.
    fn default() -> Self {
        let sizes = [
            ("cax11", 2, 4, 1.0),
            ("cax21", 4, 8, 2.0),
            ("cax31", 8, 16, 4.0),
            ("cax41", 16, 32, 8.0),
        ];
        let size = |(name, cpu, memory_gb, price): (&str, u32, u32, f64)| Size {
            name: name.to_owned(),
            cpu,
            memory_gb,
            architecture: Architecture::Arm64,
            price,
        };
        Self(sizes.map(size).to_vec())
    }
}

impl SizeTable {
    /// A table of these sizes.
    ///
    /// # Errors
    /// When there is none, or two have one name: a fragment that says so.
    pub fn new(mut sizes: Vec<Size>) -> Result<Self, String> {
        sizes.sort_by(|a, b| {
            let key = |size: &Size| (size.memory_gb, size.cpu);
            let by_size = key(a).cmp(&key(b));
            by_size.then_with(|| a.price.total_cmp(&b.price))
        });
        let mut names: Vec<&str> = sizes.iter().map(|size| size.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("has two sizes `{}`", twice[0]));
        }
        if sizes.is_empty() {
            return Err("has no size".into());
        }
        Ok(Self(sizes))
    }

    /// The sizes on which an image of this target is built, the smallest first.
    pub fn for_target(&self, target: Target) -> impl Iterator<Item = &Size> {
        self.0.iter().filter(move |size| target.runs_on(size))
    }

    /// The size of this name.
    ///
    /// # Errors
    /// When there is none, or the target is not built on it.
    pub fn named(&self, name: &str, target: Target) -> Result<&Size, NoSize> {
        let size = self.0.iter().find(|size| size.name == name);
        let size = size.ok_or_else(|| NoSize::Unknown {
            name: name.to_owned(),
            known: self.names(),
        })?;
        if target.runs_on(size) {
            return Ok(size);
        }
        Err(NoSize::Foreign {
            name: name.to_owned(),
            architecture: size.architecture,
            target: target.architecture,
        })
    }

    /// The smallest size that covers a need: the cheapest one, and of equal ones the one with less memory.
    ///
    /// # Errors
    /// When no size that the target is built on covers it.
    pub fn smallest(&self, need: Need, target: Target) -> Result<&Size, NoSize> {
        let covering = self.for_target(target).filter(|size| size.covers(need));
        let smallest = covering.min_by(|a, b| a.price.total_cmp(&b.price));
        smallest.ok_or_else(|| match self.for_target(target).last() {
            Some(largest) => NoSize::TooLarge {
                need,
                largest: largest.name.clone(),
            },
            None => NoSize::NoArchitecture {
                target: target.architecture,
                known: self.names(),
            },
        })
    }

    /// The size for another attempt after this one ran out of memory: the smallest with more memory and no fewer
    /// processors. `None` if there is no larger one.
    pub fn next(&self, size: &Size, target: Target) -> Option<&Size> {
        let more = |other: &&Size| other.memory_gb > size.memory_gb && other.cpu >= size.cpu;
        self.for_target(target).find(more)
    }

    fn names(&self) -> String {
        let names = self.0.iter();
        let names = names.map(|size| format!("`{}` ({})", size.name, size.architecture));
        names.collect::<Vec<_>>().join(", ")
    }
}

/// Targets for tests, without emulation.
#[cfg(test)]
pub(crate) const ARM: Target = Target {
    architecture: Architecture::Arm64,
    emulated_on: None,
};
#[cfg(test)]
pub(crate) const AMD: Target = Target {
    architecture: Architecture::Amd64,
    emulated_on: None,
};

#[cfg(test)]
mod tests {
    use super::*;

    fn need(cpu: u32, memory_gb: u32) -> Need {
        Need { cpu, memory_gb }
    }

    #[test]
    fn a_need_gets_the_smallest_size_that_covers_both() {
        let table = SizeTable::default();
        for (cpu, memory_gb, name) in [
            (2, 4, "cax11"),
            (1, 1, "cax11"),
            (3, 4, "cax21"),
            (2, 5, "cax21"),
            (4, 8, "cax21"),
            (4, 9, "cax31"),
            (9, 8, "cax41"),
            (16, 32, "cax41"),
        ] {
            let size = table.smallest(need(cpu, memory_gb), ARM);
            assert_eq!(size.map(|size| &*size.name), Ok(name), "{cpu} {memory_gb}");
        }
        let error = table.smallest(need(2, 33), ARM).expect_err("it is refused");
        assert_eq!(
            error.to_string(),
            "no size has 2 CPU, 33 GB: the largest is `cax41`"
        );
    }

    #[test]
    fn an_image_for_amd64_never_gets_an_arm_runner_without_emulation_by_name() {
        let table = SizeTable::default();
        assert_eq!(table.for_target(AMD).count(), 0);
        assert!(matches!(
            table.smallest(need(2, 4), AMD),
            Err(NoSize::NoArchitecture { .. })
        ));
        assert!(matches!(
            table.named("cax21", AMD),
            Err(NoSize::Foreign { .. })
        ));
        let emulated = Target {
            emulated_on: Some(Architecture::Arm64),
            ..AMD
        };
        assert_eq!(
            table
                .smallest(need(2, 4), emulated)
                .expect("a size of the table")
                .name,
            "cax11"
        );
        assert_eq!(
            table
                .named("cax21", emulated)
                .expect("a size of the table")
                .name,
            "cax21"
        );
        // Emulation on the other architecture opens nothing.
        let other = Target {
            emulated_on: Some(Architecture::Amd64),
            ..AMD
        };
        assert_eq!(table.for_target(other).count(), 0);
    }

    #[test]
    fn the_next_size_has_more_memory_until_there_is_none() {
        let table = SizeTable::default();
        let mut size = table.named("cax11", ARM).expect("a size of the table");
        let mut names = Vec::new();
        while let Some(next) = table.next(size, ARM) {
            names.push(next.name.as_str());
            size = next;
        }
        assert_eq!(names, ["cax21", "cax31", "cax41"]);
    }

    #[test]
    fn a_table_has_sizes_and_each_name_once() {
        assert_eq!(SizeTable::new(Vec::new()), Err("has no size".into()));
        let size = SizeTable::default().0[0].clone();
        let twice = SizeTable::new(vec![size.clone(), size]);
        assert_eq!(twice, Err("has two sizes `cax11`".into()));
    }
}
