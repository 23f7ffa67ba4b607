//! Sizes and durations as a person types them. Pure.

use std::time::Duration;

use crate::inputs::value::Invalid;
use flywheel_core::text::one_line;

/// Reads `90s`, `10m`, `12h`, `30d`, `2w`; a bare number counts seconds.
///
/// # Errors
/// For anything else, with an example.
pub(crate) fn duration(text: &str) -> Result<Duration, Invalid> {
    let units = [
        ("s", 1),
        ("m", 60),
        ("h", 3600),
        ("d", 86_400),
        ("w", 604_800),
    ];
    let seconds = scaled(text, "s", &units).ok_or_else(|| {
        Invalid::new(format!(
            "must be a time such as `30d`, not `{}`",
            one_line(text, 40)
        ))
        .with_hint("Write a whole number and `s`, `m`, `h`, `d` or `w`.")
    })?;
    Ok(Duration::from_secs(seconds))
}

/// Reads `500M`, `20G`, `1T` and their long forms (`20GiB`), all in powers of 1024; a bare number counts bytes.
///
/// # Errors
/// For anything else, with an example.
pub(crate) fn size(text: &str) -> Result<u64, Invalid> {
    let short = text.trim().trim_end_matches("iB").trim_end_matches('B');
    let units = [
        ("", 1),
        ("K", 1 << 10),
        ("M", 1 << 20),
        ("G", 1 << 30),
        ("T", 1 << 40),
    ];
    scaled(short, "", &units).ok_or_else(|| {
        Invalid::new(format!(
            "must be a size such as `20G`, not `{}`",
            one_line(text, 40)
        ))
        .with_hint("Write a whole number and `K`, `M`, `G` or `T` (powers of 1024).")
    })
}

fn scaled(text: &str, default: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = if unit.trim().is_empty() {
        default
    } else {
        unit.trim()
    };
    let (_, factor) = units
        .iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(unit))?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_read_as_people_write_them() {
        let seconds = |text| duration(text).map(|time| time.as_secs()).ok();
        assert_eq!(seconds("30d"), Some(30 * 86_400));
        assert_eq!(seconds(" 90 "), Some(90));
        assert_eq!(seconds("10 M"), Some(600));
        let bytes = |text| size(text).ok();
        assert_eq!(bytes("20G"), Some(20 << 30));
        assert_eq!(bytes("20 GiB"), Some(20 << 30));
        assert_eq!(bytes("1k"), Some(1024));
        assert_eq!(bytes("0"), Some(0));
    }

    #[test]
    fn nonsense_is_refused_with_an_example() {
        for text in [
            "",
            "d",
            "-1d",
            "1.5d",
            "3y",
            "99999999999999999999s",
            "99999999999999w",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
        for text in ["", "G", "-1", "20X", "99999999T"] {
            assert!(size(text).is_err(), "{text}");
        }
        let error = size("much").expect_err("no number").to_string();
        assert_eq!(error, "must be a size such as `20G`, not `much`");
    }
}
