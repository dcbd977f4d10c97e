//! A record of a contexts file: what `flotilla contexts` writes, and the older scripts' lines
//! without `documents`.

use shared::{Context, JobId, RetrievalMethod};

use super::fields::{Fields, malformed};
use super::query::{DEPENDENCIES, invalid_utf8, question, target_api};
use super::{Rejected, generation};

/// Reads one record.
pub(super) fn read(record: &[u8]) -> Result<Context, Rejected> {
    let text = std::str::from_utf8(record).map_err(|error| invalid_utf8(record, &error))?;
    let fields = Fields::parse(text).map_err(Rejected::nameless)?;
    let id = fields.id().map_err(Rejected::nameless)?;
    context(&fields, &id).map_err(|reason| Rejected {
        id: Some(id),
        query: question(&fields),
        reason,
    })
}

fn context(fields: &Fields<'_>, id: &JobId) -> Result<Context, String> {
    fields.check_doubles()?;
    let success = fields.read("success", "true or false")?.unwrap_or(true);
    let text = |name| -> Result<String, String> {
        match fields.text(name)? {
            None if success => Err(format!("expected text in `{name}`, given none")),
            text => Ok(text.unwrap_or_default()),
        }
    };
    let query = if success { fields.filled_text("query")? } else { text("query")? };
    let context = text("context")?;
    Ok(Context {
        id: id.clone(),
        query,
        target_api: target_api(fields)?,
        dependencies: fields.dependencies(&DEPENDENCIES)?,
        retrieval_method: method(fields)?,
        context_length: context.chars().count(),
        context,
        retrieval_time: fields.read("retrieval_time", "a number")?.unwrap_or(0.0),
        success,
        error: fields.text("error")?,
        documents: fields.read("documents", "a list")?.unwrap_or_default(),
        generation: generation::read(fields)?,
    })
}

fn method(fields: &Fields<'_>) -> Result<RetrievalMethod, String> {
    let Some(raw) = fields.raw("retrieval_method") else {
        return Ok(RetrievalMethod::None);
    };
    serde_json::from_str(raw.get())
        .map_err(|error| format!("field `retrieval_method`: {}", malformed(&error)))
}
