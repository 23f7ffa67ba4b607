//! `flywheel image schema`: prints what the documents of the image lane may hold.

use clap::Args;

use crate::inputs::value::one_of;
use flywheel_core::exit::{Exit, VerbError};
use flywheel_image::build_spec::BUILD_SPEC;
use flywheel_image::directives::{BUILD_DIRECTIVES, CACHE_POLICY, nickel};
use flywheel_image::document::{Record, json_schema};
use flywheel_image::size::SIZES;
use flywheel_sys::runner::workflow::{data, json_data};

/// Each document, by its name.
const DOCUMENTS: [(&str, &Record); 4] = [
    ("build-directives", &BUILD_DIRECTIVES),
    ("build-spec", &BUILD_SPEC),
    ("cache-policy", &CACHE_POLICY),
    ("sizes", &SIZES),
];

/// Print the JSON Schema of a document, or the contracts of all as one Nickel file.
///
/// The Nickel file has `BuildSpec`, `CachePolicy` and `BuildDirectives`, and on top of them `make_ci_build`,
/// `make_session_build` and `ci_cache_policy`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  flywheel image schema build-spec
  flywheel image schema --nickel > flywheel.ncl")]
pub(super) struct Schema {
    /// The document: `build-directives`, `build-spec`, `cache-policy` or `sizes` (default: `build-directives`).
    #[arg(value_name = "DOCUMENT", value_parser = one_of(&DOCUMENTS))]
    document: Option<&'static Record>,

    /// Print the Nickel contracts of all documents when `--nickel` is given (default: a JSON Schema).
    #[arg(long)]
    nickel: bool,
}

/// Prints it.
///
/// # Errors
/// None; the result is what every verb has.
#[expect(clippy::unnecessary_wraps, reason = "every verb has this result")]
pub(super) fn run(inputs: &Schema) -> Result<Exit, VerbError> {
    if inputs.nickel {
        data(nickel().trim_end());
    } else {
        let record = inputs.document.unwrap_or(&BUILD_DIRECTIVES);
        json_data(&format!("{:#}", json_schema(record)));
    }
    Ok(Exit::Ok)
}
