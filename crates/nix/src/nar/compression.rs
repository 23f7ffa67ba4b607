//! Unpacks the compressions that caches serve NARs in, in bounded memory.

use std::io::{self, BufRead, Read};

use liblzma::bufread::XzDecoder;
use liblzma::stream::{CONCATENATED, Stream};

/// The most memory that unpacking xz may use. The header of the file decides how much it needs: 65 MiB after `xz -9`. For
/// zstd, the library itself refuses windows over 128 MiB.
const XZ_MEMORY: u64 = 128 * 1024 * 1024;

/// A reader of what `packed` holds; `None` for a compression that is not unpacked here.
///
/// # Errors
/// When the library has no memory for it.
pub fn reader<'a>(
    packed: impl BufRead + 'a,
    compression: &str,
) -> io::Result<Option<Box<dyn Read + 'a>>> {
    Ok(Some(match compression {
        "none" | "" => Box::new(packed),
        "zstd" => Box::new(zstd::stream::read::Decoder::with_buffer(packed)?),
        "xz" => {
            let stream = Stream::new_stream_decoder(XZ_MEMORY, CONCATENATED)?;
            Box::new(XzDecoder::new_stream(packed, stream))
        }
        _ => return Ok(None),
    }))
}
