//! What the name of a step says: the stage that it belongs to, and its number there.

/// A step's place, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StageName<'a> {
    /// A step of the Dockerfile: `[cooker 2/3] RUN …`, `[2/3] RUN …`, `[linux/arm64 cooker 2/3] RUN …`.
    Step {
        /// Empty for the stage without a name.
        stage: &'a str,
        number: u32,
        of: u32,
        /// The instruction.
        instruction: &'a str,
    },
    /// What BuildKit does for itself, such as to load the context.
    Internal,
    /// What belongs to no stage, such as an export.
    Other,
}

impl<'a> StageName<'a> {
    /// Reads a name.
    pub fn of(name: &'a str) -> Self {
        let Some((head, instruction)) = name
            .strip_prefix('[')
            .and_then(|rest| rest.split_once("] "))
        else {
            return Self::Other;
        };
        if head == "internal" || head == "auth" {
            return Self::Internal;
        }
        let (before, count) = head.rsplit_once(' ').unwrap_or(("", head));
        let numbers = count.split_once('/');
        let numbers =
            numbers.and_then(|(number, of)| Some((number.parse().ok()?, of.parse().ok()?)));
        let Some((number, of)) = numbers else {
            return Self::Other;
        };
        // A build for several platforms puts the platform first.
        let stage = match before.split_once(' ') {
            Some((platform, stage)) if platform.contains('/') => stage,
            None if before.contains('/') => "",
            _ => before,
        };
        Self::Step {
            stage: stage.trim(),
            number,
            of,
            instruction,
        }
    }
}
