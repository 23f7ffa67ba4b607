//! Text from outside in Markdown, as GitHub renders it: nothing in it is markup. Pure.

use crate::text::one_line;

/// A block that its content cannot close: its fence is longer than every run of backticks inside.
pub fn fenced(text: &str) -> String {
    let fence = "`".repeat(longest_ticks(text).max(2) + 1);
    format!("{fence}\n{text}\n{fence}")
}

/// A text as code within a line.
pub fn code(text: &str) -> String {
    let text = one_line(text, 500);
    let fence = "`".repeat(longest_ticks(&text) + 1);
    // A space keeps a tick at the edge apart from the fence; Markdown takes it away again.
    let space = if text.contains('`') { " " } else { "" };
    format!("{fence}{space}{text}{space}{fence}")
}

fn longest_ticks(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or(0)
}

/// Escapes a text from outside for Markdown, so that nothing in it is markup and no person is mentioned.
pub fn plain(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => safe.push_str("&lt;"),
            '&' => safe.push_str("&amp;"),
            '@' => safe.push_str("&#64;"),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '~' | '!' | '#' => safe.extend(['\\', c]),
            c => safe.push(c),
        }
    }
    safe
}

/// Escapes a text from outside for HTML, which Markdown leaves as it is: within the tags of a block, such as `<summary>`,
/// a backslash escapes nothing.
pub fn html(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('@', "&#64;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_leaves_its_block() {
        assert_eq!(fenced("a\n```\nb"), "````\na\n```\nb\n````");
        assert_eq!(code("a`b"), "`` a`b ``");
        assert_eq!(code("plain"), "`plain`");
    }

    #[test]
    fn nothing_is_a_tag() {
        assert_eq!(
            html("a_b </summary> & @you"),
            "a_b &lt;/summary&gt; &amp; &#64;you"
        );
    }

    #[test]
    fn nothing_is_markup_and_nobody_is_mentioned() {
        assert_eq!(
            plain("<b>*x*</b> @you & [a](b)"),
            "&lt;b>\\*x\\*&lt;/b> &#64;you &amp; \\[a\\](b)"
        );
    }
}
