//! Writes GGUF files: sound ones, and unsound ones through the public fields.

use airstream::format::quant::QuantType;

/// A GGUF file under construction.
#[derive(Clone)]
pub struct GgufWriter {
    pub version: u32,
    /// Alignment of the tensors; [`GgufWriter::to_bytes`] does not write it as metadata.
    pub alignment: usize,
    /// Key, number of the value type, bytes of the value.
    pub entries: Vec<(String, u32, Vec<u8>)>,
    pub tensors: Vec<Tensor>,
}

/// One tensor of a file under construction.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dims: Vec<u64>,
    pub ggml_type: u32,
    /// From the start of the tensor data.
    pub offset: u64,
    pub data: Vec<u8>,
}

impl GgufWriter {
    /// An empty file of version 3.
    pub fn new() -> Self {
        GgufWriter {
            version: 3,
            alignment: 32,
            entries: Vec::new(),
            tensors: Vec::new(),
        }
    }

    /// Adds an entry with the bytes `value` of the type with number `value_type`.
    pub fn entry(&mut self, key: &str, value_type: u32, value: &[u8]) {
        self.entries
            .push((key.to_owned(), value_type, value.to_owned()));
    }

    pub fn u32(&mut self, key: &str, value: u32) {
        self.entry(key, 4, &value.to_le_bytes());
    }

    pub fn f32(&mut self, key: &str, value: f32) {
        self.entry(key, 6, &value.to_le_bytes());
    }

    pub fn str(&mut self, key: &str, value: &str) {
        self.entry(key, 8, &string(value));
    }

    /// Adds a tensor behind the last one.
    pub fn tensor(&mut self, name: &str, dims: &[u64], qtype: QuantType, data: Vec<u8>) {
        self.push(name, dims, qtype.ggml_type(), data);
    }

    /// The same by the number of the type.
    pub fn push(&mut self, name: &str, dims: &[u64], ggml_type: u32, data: Vec<u8>) {
        let last = self.tensors.last();
        let offset = last.map_or(0, |t| t.offset as usize + t.data.len());
        self.tensors.push(Tensor {
            name: name.to_owned(),
            dims: dims.to_owned(),
            ggml_type,
            offset: offset.next_multiple_of(self.alignment) as u64,
            data,
        });
    }

    /// The bytes before the tensor data, without padding.
    pub fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value_type, value) in &self.entries {
            out.extend(string(key));
            out.extend(value_type.to_le_bytes());
            out.extend(value);
        }
        for t in &self.tensors {
            out.extend(string(&t.name));
            out.extend((t.dims.len() as u32).to_le_bytes());
            out.extend(t.dims.iter().flat_map(|d| d.to_le_bytes()));
            out.extend(t.ggml_type.to_le_bytes());
            out.extend(t.offset.to_le_bytes());
        }
        out
    }

    /// The whole file. Data of tensors with an offset that was changed stays where it was added.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        for t in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&t.data);
        }
        out
    }
}

/// A string as GGUF stores it.
pub fn string(text: &str) -> Vec<u8> {
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out
}

/// The value of an array entry: type of the elements, number of elements, their bytes.
pub fn array(element_type: u32, len: u64, elements: &[u8]) -> Vec<u8> {
    [
        &element_type.to_le_bytes()[..],
        &len.to_le_bytes(),
        elements,
    ]
    .concat()
}
