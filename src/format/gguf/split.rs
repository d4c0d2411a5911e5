//! Models split over several files: finding the parts and checking that they belong together.
//!
//! A part is named `NAME-00002-of-00003.gguf` and says so in `split.no` (from 0), `split.count`
//! and `split.tensors.count` (of the whole model).

use std::path::{Path, PathBuf};

use super::{Part, cursor};
use crate::error::{Error, Kind, Result};

/// Opens the file at `path`, and every other part if it is one of several.
pub(super) fn open(path: &Path) -> Result<Vec<Part>> {
    let named = Part::open(path, 0)?;
    let count = named.u32("split.count")?.unwrap_or(1);
    if count <= 1 {
        return Ok(vec![named]);
    }
    let number = part_number(&named)?;
    let expected = format!("-{:05}-of-{count:05}.gguf", u64::from(number) + 1);
    let file_name = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let Some(prefix) = file_name.strip_suffix(&expected) else {
        return Err(Error::new(
            Kind::Usage,
            format!(
                "{} is part {} of {count} by its metadata, but its name does not end in {expected}",
                path.display(),
                u64::from(number) + 1
            ),
            "give all parts of the model their original names, in one folder",
        ));
    };
    let mut parts = Vec::new();
    for i in 0..count {
        let part = path.with_file_name(format!("{prefix}-{:05}-of-{count:05}.gguf", i + 1));
        parts.push(open_part(part, i, count)?);
    }
    check_tensor_count(&parts)?;
    Ok(parts)
}

/// Opens part `index` of `count`.
fn open_part(path: PathBuf, index: u32, count: u32) -> Result<Part> {
    if !path.exists() {
        return Err(Error::new(
            Kind::Io,
            format!(
                "part {} of {count} of the model is missing: {}",
                index + 1,
                path.display()
            ),
            format!("put all {count} parts of the model into one folder"),
        ));
    }
    let part = Part::open(&path, index as usize)?;
    if part.u32("split.count")? != Some(count) || part_number(&part)? != index {
        return Err(cursor::damaged(
            &path,
            format_args!("by its metadata this is not part {} of {count}", index + 1),
        ));
    }
    Ok(part)
}

fn part_number(part: &Part) -> Result<u32> {
    part.u32("split.no")?
        .ok_or_else(|| cursor::damaged(&part.path, "it has split.count, but no split.no"))
}

/// The first part says how many tensors all parts have together.
fn check_tensor_count(parts: &[Part]) -> Result<()> {
    let Some(expected) = parts[0].u32("split.tensors.count")? else {
        return Ok(());
    };
    let found: usize = parts.iter().map(|part| part.header.tensors.len()).sum();
    if found == expected as usize {
        return Ok(());
    }
    Err(cursor::damaged(
        &parts[0].path,
        format_args!("its parts have {found} tensors together, split.tensors.count is {expected}"),
    ))
}
