//! What the unit tests of several crates need. No crate depends on it but for its tests.

use std::path::{Path, PathBuf};
use std::time::Duration;

use flywheel_sys::process::capture::Tool;

const LIMIT: Duration = Duration::from_secs(10);

/// Makes a shell script. A child writes it: a file that a fork of ours, of another test's thread,
/// still holds open for writing cannot be run.
pub async fn script(folder: &Path, name: &str, text: &str) -> PathBuf {
    let file = folder.join(name);
    let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$0" && /bin/chmod 755 "$0""#;
    let tool = Tool::new(Path::new("/bin/sh"))
        .args(["-c", write])
        .arg(&file)
        .arg(text);
    assert!(tool.run(LIMIT).await.expect("runs").status.success());
    file
}
