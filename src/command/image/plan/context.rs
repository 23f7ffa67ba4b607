//! What a plan reads of the context: the names of the files at its top, and what its author asks for. And how documents
//! are read from their files.

use std::fs;
use std::io;
use std::path::Path;

use serde::de::DeserializeOwned;

use flywheel_core::exit::{UsageError, VerbError, named_file_error};
use flywheel_image::build_spec::{self, BUILD_SPEC, BuildSpec};
use flywheel_image::document::{self, Format, Record, SIZE_LIMIT};
use flywheel_image::nickel;
use flywheel_nix::tool::on_path;
use flywheel_sys::runner::env::Env;
use flywheel_sys::untrusted_file::{self, Owner};

/// More names than these are not looked at.
const MOST_NAMES: usize = 10_000;

/// The context of a build.
pub(super) struct Context {
    names: Vec<String>,
    /// What its author asks for, and the name of the file.
    pub(super) spec: Option<(String, BuildSpec)>,
}

impl Context {
    /// Reads the top of a folder.
    ///
    /// # Errors
    /// When the folder cannot be read, or what its author asks for is wrong.
    pub(super) async fn read(folder: &Path, env: &Env) -> Result<Self, VerbError> {
        let names = names(folder).map_err(|error| {
            let hint = "Name the folder with the build's files.";
            named_file_error("CONTEXT", folder, "be read", error, hint)
        })?;
        let found = build_spec::file_of(folder, names.iter().map(String::as_str))
            .map_err(|error| error.of_input("CONTEXT"))?;
        let spec = match found {
            None => None,
            Some((file, _)) => {
                refuse_link(&file)?;
                let spec = document("CONTEXT", &file, &BUILD_SPEC, env).await?;
                let name = file.file_name().unwrap_or_default();
                Some((name.to_string_lossy().into_owned(), spec))
            }
        };
        Ok(Self { names, spec })
    }

    pub(super) fn names(&self) -> Vec<&str> {
        self.names.iter().map(String::as_str).collect()
    }
}

fn names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(folder)?.take(MOST_NAMES);
    // A name that is no UTF-8 means nothing here.
    let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
    Ok(names
        .collect::<io::Result<Vec<_>>>()?
        .into_iter()
        .flatten()
        .collect())
}

/// A message quotes what is wrong in a document. A link could make that any file of this user's.
fn refuse_link(file: &Path) -> Result<(), UsageError> {
    let is_link = fs::symlink_metadata(file).is_ok_and(|file| file.is_symlink());
    if is_link {
        let problem = format!("holds `{}`, which is a symbolic link", file.display());
        let hint = "Put the file itself into the context.";
        return Err(UsageError::new("CONTEXT", problem).with_hint(hint));
    }
    Ok(())
}

/// Reads a document that an input names.
///
/// # Errors
/// When the file cannot be read, has an unknown ending, or is not what the record allows.
pub(super) async fn document<T: DeserializeOwned>(
    input: &str,
    file: &Path,
    record: &Record,
    env: &Env,
) -> Result<T, VerbError> {
    let name = file.display().to_string();
    let Some(format) = Format::of(file) else {
        let problem =
            format!("names `{name}`, whose ending is none of `.ncl`, `.json`, `.toml`, `.yml`");
        return Err(UsageError::new(input, problem).into());
    };
    let read = || untrusted_file::read_text(file, Owner::Any, SIZE_LIMIT);
    let hint = "Name a document that exists and can be read.";
    let text = read().map_err(|error| named_file_error(input, file, "be read", error, hint))?;
    let document = if format == Format::Nickel {
        let value = nickel::evaluate(on_path(env, "nickel").as_deref(), file).await;
        value.and_then(|value| document::accept(&name, &value, record))
    } else {
        document::read(&name, format, &text, record)
    };
    Ok(document.map_err(|error| error.of_input(input))?)
}
