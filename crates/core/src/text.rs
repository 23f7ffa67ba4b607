//! Text for people: spelling suggestions, counts, sizes, durations. Pure.

use std::borrow::Cow;
use std::time::Duration;

/// The known word that is most similar to `word`, if it is similar enough for a typing error.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    known
        .into_iter()
        .map(|candidate| {
            (
                strsim::osa_distance(&word, &candidate.to_lowercase()),
                candidate,
            )
        })
        // One typing error, and one more for every four letters.
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len() / 4)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// `1 path`, `2 paths`.
pub fn count(number: u64, noun: &str) -> String {
    if number == 1 {
        format!("1 {noun}")
    } else {
        format!("{number} {noun}s")
    }
}

/// A size in bytes for people: `512 B`, `1.5 MiB`.
pub fn bytes(size: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if size < 1024 {
        return format!("{size} B");
    }
    let mut value = size as f64 / 1024.0;
    let mut unit = 0;
    // From 1023.95 on, rounding to one digit would show 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A duration for people: `0.4 s`, `12.0 s`, `3 min 20 s`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{} min {} s", time.as_secs() / 60, time.as_secs() % 60)
    }
}

/// The first `limit` characters, with an ellipsis if the text is longer.
pub fn shorten(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

/// Shows what a reader would not see, or see in another order than it stands, as `\u{202e}`: control characters but tab,
/// line feed and carriage return, what turns the direction of writing, what has no width, and the line separators of
/// Unicode.
pub fn visible(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 8);
    for character in text.chars() {
        if is_hidden(character) {
            shown.extend(character.escape_unicode());
        } else {
            shown.push(character);
        }
    }
    Cow::Owned(shown)
}

/// Whether `visible` shows a character as its number. The variation selectors U+FE00 to U+FE0F belong to emoji and stay.
pub fn is_hidden(character: char) -> bool {
    match character {
        '\t' | '\n' | '\r' => false,
        // The soft hyphen, the combining grapheme joiner, and fillers and vowels that are drawn as nothing.
        '\u{ad}'
        | '\u{34f}'
        | '\u{61c}'
        | '\u{115f}'
        | '\u{1160}'
        | '\u{17b4}'
        | '\u{17b5}'
        | '\u{180b}'..='\u{180f}'
        | '\u{3164}'
        | '\u{ffa0}'
        | '\u{feff}' => true,
        // Zero width, marks, embeddings, overrides and isolates; both separators; invisible operators.
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' => true,
        // Interlinear annotation, shorthand and musical formats, tags, further variation selectors.
        '\u{fff0}'..='\u{fffb}'
        | '\u{1bca0}'..='\u{1bca3}'
        | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0000}'..='\u{e0fff}' => true,
        other => other.is_control(),
    }
}

/// Makes text from outside safe for one line: control characters become spaces, others that are not seen are shown, and
/// the text is shortened.
pub fn one_line(text: &str, limit: usize) -> String {
    let line: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    shorten(&visible(line.trim()), limit)
}

/// A text without escape sequences (ECMA-48) and without control characters other than line ends and tabs.
pub fn without_ansi(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => skip_sequence(&mut chars),
            '\n' | '\t' => clean.push(c),
            c if c.is_control() => {}
            c => clean.push(c),
        }
    }
    clean
}

fn skip_sequence(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) {
    match chars.next() {
        // A control sequence: parameters up to a final byte (ECMA-48, 5.4). A line end cuts it off, so that a sequence
        // without an end does not swallow the next line.
        Some('[') => {
            while chars
                .next_if(|c| !('@'..='~').contains(c) && *c != '\n')
                .is_some()
            {}
        }
        // An operating system command, such as a hyperlink or a title: up to BEL, or to ESC and a backslash.
        Some(']') => {
            while chars
                .next_if(|c| !matches!(c, '\u{7}' | '\u{1b}' | '\n'))
                .is_some()
            {}
            if chars.next_if_eq(&'\u{1b}').is_none() {
                chars.next_if_eq(&'\u{7}');
                return;
            }
            chars.next_if_eq(&'\\');
            return;
        }
        _ => return,
    }
    chars.next_if(|c| *c != '\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_finds_typing_errors_and_refuses_other_words() {
        let known = ["auto", "true", "false"];
        assert_eq!(nearest("ture", known), Some("true"));
        assert_eq!(nearest("Flase", known), Some("false"));
        assert_eq!(nearest("banana", known), None);
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(1024 * 1024), "1.0 MiB");
        assert_eq!(bytes(3 * 1024 * 1024 * 1024), "3.0 GiB");
    }

    #[test]
    fn one_line_cannot_break_a_line() {
        assert_eq!(one_line("a\r\nb\u{1b}[31m", 10), "a  b [31m");
        assert_eq!(shorten("äöü", 2), "äö…");
        assert_eq!(one_line("a\u{202e}b\u{2028}c", 30), "a\\u{202e}b\\u{2028}c");
    }

    #[test]
    fn what_is_not_seen_is_shown() {
        let plain = "Grüße, שלום, ✅ ⚠\u{fe0f}\tx\r\n";
        assert!(matches!(visible(plain), Cow::Borrowed(same) if same == plain));
        // Every control of the bidirectional algorithm (UAX 9), zero width, C0, C1, separators, tags.
        let hidden = "\u{61c}\u{200e}\u{200f}\u{202a}\u{202b}\u{202c}\u{202d}\u{202e}\u{2066}\u{2067}\u{2068}\u{2069}\
                      \u{200b}\u{200c}\u{200d}\u{2060}\u{feff}\0\u{1b}\u{7f}\u{85}\u{9b}\u{2028}\u{2029}\u{e0041}\u{ad}";
        for character in hidden.chars() {
            let shown = visible(&format!("a{character}b")).into_owned();
            assert_eq!(shown, format!("a\\u{{{:x}}}b", u32::from(character)));
        }
    }
}
