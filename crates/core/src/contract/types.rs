//! The types of a contract file's values: sizes, versions, skills, yes and no, and mappings that keep their order.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap as _, Serializer};

use crate::text::nearest;

/// Values by name, in the order of the file. `null` in a file removes the value of that name from the contract below
/// it.
#[derive(Clone, Debug)]
pub struct NamedMap<T> {
    entries: Vec<(String, T)>,
    removed: Vec<String>,
}

impl<T> NamedMap<T> {
    /// The value of this name.
    pub fn get(&self, name: &str) -> Option<&T> {
        self.entries
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value)
    }

    /// Names and values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.entries
            .iter()
            .map(|(name, value)| (name.as_str(), value))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds the entries of `over`: by `merge` where the name is known, at the end where it is new.
    pub(super) fn overlay(&mut self, over: Self, merge: impl Fn(&mut T, T)) {
        self.entries
            .retain(|(name, _)| !over.removed.contains(name));
        for (name, value) in over.entries {
            match self.entries.iter_mut().find(|(known, _)| *known == name) {
                Some((_, old)) => merge(old, value),
                None => self.entries.push((name, value)),
            }
        }
    }
}

impl<T> Default for NamedMap<T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            removed: Vec::new(),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for NamedMap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Pairs<T> {
            type Value = NamedMap<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mapping of names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<NamedMap<T>, A::Error> {
                let mut named = NamedMap::default();
                while let Some(name) = map.next_key::<String>()? {
                    match map.next_value::<Option<T>>()? {
                        Some(value) => named.entries.push((name, value)),
                        None => named.removed.push(name),
                    }
                }
                Ok(named)
            }
        }
        deserializer.deserialize_map(Pairs(PhantomData))
    }
}

impl<T: Serialize> Serialize for NamedMap<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.entries.len()))?;
        for (name, value) in &self.entries {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// Implements serde's traits by `parse` and `Display`.
macro_rules! as_text {
    ($type:ty, $expecting:literal) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl Visitor<'_> for Text {
                    type Value = $type;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }

                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$type, E> {
                        <$type>::parse(text).map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Text)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    };
}

/// A size of memory, such as `8GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(u64);

impl Size {
    const UNITS: [(&str, u32); 3] = [("TiB", 40), ("GiB", 30), ("MiB", 20)];

    pub fn bytes(self) -> u64 {
        self.0
    }

    /// Reads `8GiB`, `512 MiB`.
    ///
    /// # Errors
    /// A sentence with an example of a size.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no size; write it as `8GiB` or `512MiB`");
        let (unit, shift) = Self::UNITS
            .into_iter()
            .find(|(unit, _)| text.ends_with(unit))
            .ok_or_else(wrong)?;
        let number: u64 = text
            .trim_end_matches(unit)
            .trim()
            .parse()
            .map_err(|_| wrong())?;
        let bytes = number
            .checked_mul(1 << shift)
            .filter(|bytes| *bytes > 0)
            .ok_or_else(wrong)?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole =
            |(_, shift): &(&str, u32)| self.0 >= 1 << shift && self.0.trailing_zeros() >= *shift;
        let (unit, shift) = Self::UNITS.into_iter().find(whole).unwrap_or(("MiB", 20));
        write!(f, "{}{unit}", self.0 >> shift)
    }
}

as_text!(Size, "a size such as `8GiB`");

/// Something that a lane provides and a job may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skill {
    /// Nix with flakes.
    Nix,
    /// An Attic client.
    Attic,
    /// Git.
    Git,
    /// Node.js.
    Node,
    /// pnpm.
    Pnpm,
    /// A Docker endpoint.
    Docker,
    /// BuildKit.
    Buildkit,
    /// A C compiler.
    Compiler,
    /// Headers to build kernel modules with.
    KernelHeaders,
    /// Hardware virtualisation.
    Kvm,
    /// A graphics processor.
    Gpu,
}

impl Skill {
    const NAMES: [(&str, Self); 11] = [
        ("nix", Self::Nix),
        ("attic", Self::Attic),
        ("git", Self::Git),
        ("node", Self::Node),
        ("pnpm", Self::Pnpm),
        ("docker", Self::Docker),
        ("buildkit", Self::Buildkit),
        ("compiler", Self::Compiler),
        ("kernel-headers", Self::KernelHeaders),
        ("kvm", Self::Kvm),
        ("gpu", Self::Gpu),
    ];

    /// The name of the skill in a file.
    pub(crate) fn as_str(self) -> &'static str {
        Self::NAMES
            .into_iter()
            .find(|(_, skill)| *skill == self)
            .expect("every skill has a name")
            .0
    }

    fn parse(text: &str) -> Result<Self, String> {
        if let Some((_, skill)) = Self::NAMES.into_iter().find(|(name, _)| *name == text) {
            return Ok(skill);
        }
        let names = Self::NAMES.map(|(name, _)| name);
        Err(match nearest(text, names) {
            Some(name) => {
                format!("`{text}` is nothing that a lane provides; did you mean `{name}`?")
            }
            None => format!(
                "`{text}` is nothing that a lane provides; known are {}",
                names.join(", ")
            ),
        })
    }
}

impl fmt::Display for Skill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

as_text!(Skill, "the name of something that a lane provides");

/// The versions of a tool that are accepted: `>=18`, `>=2.8 <3`, or `*` for any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    bounds: Vec<(Bound, Vec<u32>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bound {
    AtLeast,
    Below,
}

impl Requirement {
    /// Reads `>=18`, `>=2.8 <3` or `*`.
    ///
    /// # Errors
    /// A sentence with an example.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("`{text}` names no versions; write them as `>=18`, `>=2.8 <3`, or `*` for any")
        };
        if text.trim() == "*" {
            return Ok(Self { bounds: Vec::new() });
        }
        let bound = |text: &str| {
            let at_least = text
                .strip_prefix(">=")
                .map(|number| (Bound::AtLeast, number));
            let (bound, number) =
                at_least.or_else(|| text.strip_prefix('<').map(|number| (Bound::Below, number)))?;
            Some((
                bound,
                numbers(number).filter(|_| number.starts_with(|c: char| c.is_ascii_digit()))?,
            ))
        };
        let bounds: Option<Vec<_>> = text.split_whitespace().map(bound).collect();
        bounds
            .filter(|bounds| !bounds.is_empty())
            .map(|bounds| Self { bounds })
            .ok_or_else(wrong)
    }

    /// Whether a version is accepted: the first number in `version` and those after its dots count.
    pub fn allows(&self, version: &str) -> bool {
        let Some(found) = numbers(version) else {
            return self.bounds.is_empty();
        };
        self.bounds.iter().all(|(bound, wanted)| match bound {
            Bound::AtLeast => found >= *wanted,
            Bound::Below => found < *wanted,
        })
    }
}

/// The numbers of the first version in a text: `git version 2.39.5` gives 2, 39, 5.
fn numbers(text: &str) -> Option<Vec<u32>> {
    let start = text.find(|c: char| c.is_ascii_digit())?;
    let end = text[start..]
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .map_or(text.len(), |end| start + end);
    text[start..end]
        .split('.')
        .filter(|part| !part.is_empty())
        .map(|part| part.parse().ok())
        .collect()
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.bounds.is_empty() {
            return f.write_str("*");
        }
        for (index, (bound, numbers)) in self.bounds.iter().enumerate() {
            let space = if index > 0 { " " } else { "" };
            let sign = if *bound == Bound::AtLeast { ">=" } else { "<" };
            let numbers: Vec<String> = numbers.iter().map(ToString::to_string).collect();
            write!(f, "{space}{sign}{}", numbers.join("."))?;
        }
        Ok(())
    }
}

as_text!(Requirement, "versions such as `>=18`");

/// Whether a cache may be reached, and how, such as `yes, inside the cluster`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    pub(crate) allowed: bool,
    /// How it may be reached, or what there is instead.
    pub(crate) how: Option<String>,
}

impl Access {
    fn parse(text: &str) -> Result<Self, String> {
        let (answer, how) = text.split_once(',').map_or((text, None), |(answer, how)| {
            (answer, Some(how.trim().to_owned()))
        });
        match answer.trim() {
            "yes" | "true" => Ok(Self { allowed: true, how }),
            "no" | "false" => Ok(Self {
                allowed: false,
                how,
            }),
            _ => Err(format!(
                "`{text}` must begin with `yes` or `no`, and may go on behind a comma"
            )),
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.allowed { "yes" } else { "no" })?;
        self.how.iter().try_for_each(|how| write!(f, ", {how}"))
    }
}

as_text!(Access, "`yes` or `no`, and how");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_survive_both_ways() {
        for text in ["8GiB", "512MiB", "2TiB", "1536MiB"] {
            assert_eq!(Size::parse(text).expect("a size").to_string(), text);
        }
        for wrong in ["8", "8GB", "GiB", "-1GiB", "0GiB", "99999999999TiB"] {
            assert!(Size::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn versions_are_compared_number_by_number() {
        let check = |requirement: &str, version: &str| {
            Requirement::parse(requirement)
                .expect("one")
                .allows(version)
        };
        assert!(
            check(">=2.8", "nix (Nix) 2.34.8") && check(">=18", "v18") && check("*", "anything")
        );
        assert!(
            check(">=2.8 <3", "2.99")
                && !check(">=2.8 <3", "3.0.1")
                && !check(">=2.8", "nix (Nix) 2.3.16")
        );
        assert!(!check(">=1", "no number"));
        for wrong in ["", "18", ">18", ">=x", "latest"] {
            assert!(Requirement::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_skill_that_does_not_exist_gets_a_hint() {
        assert!(
            Skill::parse("dokcer")
                .expect_err("no such skill")
                .contains("did you mean `docker`")
        );
    }
}
