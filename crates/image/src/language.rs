//! The language of a build, by the files of its context, and what builds in it usually need. The last resort of the
//! sizing.

use crate::size::Need;

/// A language that builds are sized by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    Rust,
    Java,
    Go,
    /// Any other one, or none.
    Other,
}

/// The files that a language's builds begin with. A context with several of them counts as the first language here,
/// since the hungriest build decides.
const MARKERS: [(&str, Language); 8] = [
    ("Cargo.toml", Language::Rust),
    ("Cargo.lock", Language::Rust),
    ("pom.xml", Language::Java),
    ("build.gradle", Language::Java),
    ("build.gradle.kts", Language::Java),
    ("settings.gradle", Language::Java),
    ("settings.gradle.kts", Language::Java),
    ("go.mod", Language::Go),
];

impl Language {
    /// The language, by the names of the files at the top of the context; and the file that shows it.
    pub fn detect<'a>(names: &[&'a str]) -> (Self, Option<&'a str>) {
        let mut found = MARKERS.iter().filter_map(|(marker, language)| {
            let name = names.iter().find(|name| *name == marker)?;
            Some((*language, Some(*name)))
        });
        found.next().unwrap_or((Self::Other, None))
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rust => "rust",
            Self::Java => "java",
            Self::Go => "go",
            Self::Other => "other",
        }
    }

    /// What a build needs, and its time in minutes.
    pub fn needs(self) -> (Need, u32) {
        let (cpu, memory_gb, minutes) = match self {
            Self::Rust => (4, 8, 60),
            Self::Java => (4, 8, 45),
            Self::Go | Self::Other => (2, 4, 30),
        };
        (Need { cpu, memory_gb }, minutes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_language_has_its_files_and_its_numbers() {
        for (names, language, cpu, memory_gb, minutes) in [
            (&["Dockerfile", "Cargo.toml"][..], Language::Rust, 4, 8, 60),
            (&["pom.xml"], Language::Java, 4, 8, 45),
            (&["build.gradle.kts", "src"], Language::Java, 4, 8, 45),
            (&["go.mod"], Language::Go, 2, 4, 30),
            (&["package.json"], Language::Other, 2, 4, 30),
            (&[], Language::Other, 2, 4, 30),
            // The hungriest decides.
            (&["go.mod", "Cargo.toml"], Language::Rust, 4, 8, 60),
            // Names are compared byte for byte, as the build tools do.
            (&["cargo.toml", "GO.MOD"], Language::Other, 2, 4, 30),
        ] {
            assert_eq!(Language::detect(names).0, language, "{names:?}");
            assert_eq!(
                language.needs(),
                (Need { cpu, memory_gb }, minutes),
                "{names:?}"
            );
        }
        assert_eq!(Language::detect(&["a", "go.mod"]).1, Some("go.mod"));
    }
}
