package toc

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// Type names in the JSON, by [Type]. "chunk" is none of a file's: such an entry
// holds a further chunk of the regular file before it.
var typeNames = [...]string{
	Regular: "reg", Directory: "dir", Symlink: "symlink", Hardlink: "hardlink",
	CharDevice: "char", BlockDevice: "block", FIFO: "fifo",
}

const typeChunk = "chunk"

// A JSONWriter writes the table of contents that eStargz and zstd:chunked share,
// entry by entry, in memory that does not grow with their number. The bytes are a function of the
// entries alone. stargz-snapshotter reads the result, and containers/storage does
// if no two chunks share a member.
//
// It differs from what they write in three ways. mtimes keep their nanoseconds. There is no
// userName and groupName. And JSON cannot hold names that are not UTF-8: their bad bytes become U+FFFD,
// as with other writers, and the true bytes follow in base64 in "nameBytes", "linkNameBytes" and,
// for names of xattrs, as keys of "xattrsBytes". Other readers ignore these; [Parse] does not.
type JSONWriter struct {
	w   io.Writer
	buf []byte
	n   int // entries so far
	err error
}

// NewJSONWriter returns a writer that writes to w, in pieces of about 64 KiB.
// Wrapping w in a buffer gains nothing.
func NewJSONWriter(w io.Writer) *JSONWriter {
	return &JSONWriter{w: w, buf: append(make([]byte, 0, 72<<10), `{"version":1,"entries":[`...)}
}

// Entry appends e. For a regular file, content is its chunks, without gap or
// overlap and adding up to e.Size, and file the digest of the whole (a zero digest is left out);
// otherwise content is empty. The chunk indexes in e are not looked at.
// Holes cannot be written: every reader must find their bytes in the tar. The writer keeps none of the arguments.
func (j *JSONWriter) Entry(e *Entry, content []Chunk, file Digest) error {
	if j.err != nil {
		return j.err
	}
	if err := checkContent(e, content); err != nil {
		return fmt.Errorf("entry %.300q: %w", e.Name, err)
	}
	j.begin(e.Name, typeNames[e.Type])
	if b := e.Name; replaced(b) {
		j.base64("nameBytes", b)
	}
	if e.Link != "" {
		j.string("linkName", e.Link)
		if replaced(e.Link) {
			j.base64("linkNameBytes", e.Link)
		}
	}
	j.number("size", e.Size)
	if e.MTime != 0 || e.MTimeNsec != 0 {
		j.key("modtime")
		j.buf = append(j.buf, '"')
		j.buf = time.Unix(e.MTime, int64(e.MTimeNsec)).UTC().AppendFormat(j.buf, time.RFC3339Nano)
		j.buf = append(j.buf, '"')
	}
	j.number("mode", int64(e.Mode))
	j.number("uid", int64(e.UID))
	j.number("gid", int64(e.GID))
	j.number("devMajor", int64(e.Major))
	j.number("devMinor", int64(e.Minor))
	j.xattrs(e.Xattrs)
	if e.Type == Regular && !file.IsZero() {
		j.digest("digest", file)
	}
	for i := range content {
		c := &content[i]
		if i > 0 {
			j.buf = append(j.buf, '}')
			j.begin(e.Name, typeChunk)
		}
		j.number("offset", c.Member)
		j.number("innerOffset", c.Inner)
		if len(content) > 1 {
			j.number("chunkOffset", c.FileOffset)
			j.number("chunkSize", c.Size)
		}
		j.digest("chunkDigest", c.Digest)
		// A large file has many chunks: keep the buffer small among them too.
		if len(j.buf) >= 64<<10 {
			j.flush()
		}
	}
	j.buf = append(j.buf, '}')
	if len(j.buf) >= 64<<10 {
		j.flush()
	}
	return j.err
}

// Close writes the end of the JSON. It does not close the writer below.
func (j *JSONWriter) Close() error {
	if j.err != nil {
		return j.err
	}
	j.buf = append(j.buf, "\n]}\n"...)
	j.flush()
	if err := j.err; err != nil {
		return err
	}
	j.err = errors.New("toc: written after Close")
	return nil
}

// checkContent returns why content is not the content of e.
func checkContent(e *Entry, content []Chunk) error {
	if e.Type < Regular || e.Type > FIFO {
		return fmt.Errorf("type %d", e.Type)
	}
	if e.Type != Regular && (len(content) > 0 || e.Size != 0) {
		return fmt.Errorf("a %s with content", typeNames[e.Type])
	}
	var off int64
	for i := range content {
		c := &content[i]
		switch {
		case c.Hole:
			return fmt.Errorf("a hole at byte %d, which JSON for other readers cannot hold", c.FileOffset)
		case c.FileOffset != off:
			return fmt.Errorf("chunk at byte %d, want %d", c.FileOffset, off)
		case c.Size <= 0 || c.Size > e.Size-off:
			return fmt.Errorf("chunk of %d bytes at byte %d of %d", c.Size, off, e.Size)
		}
		off += c.Size
	}
	if off != e.Size {
		return fmt.Errorf("chunks of %d bytes for a file of %d", off, e.Size)
	}
	return nil
}

// replaced reports whether a reader of the JSON could not tell s from another string.
func replaced(s string) bool {
	return !utf8.ValidString(s) || strings.Contains(s, "\uFFFD")
}

func (j *JSONWriter) begin(name, typ string) {
	if j.n > 0 {
		j.buf = append(j.buf, ',')
	}
	j.n++
	if name == "" {
		name = "./" // the root, as tar has it: some readers take "" for a missing name
	}
	j.buf = append(j.buf, "\n{\"name\":"...)
	j.quote(name)
	j.string("type", typ)
}

func (j *JSONWriter) key(k string) {
	j.buf = append(j.buf, ',', '"')
	j.buf = append(j.buf, k...)
	j.buf = append(j.buf, '"', ':')
}

// quote appends s as a JSON string. That bad UTF-8 is replaced is documented at JSONWriter.
func (j *JSONWriter) quote(s string) { j.buf, _ = jsontext.AppendQuote(j.buf, s) }

func (j *JSONWriter) string(k, v string) {
	j.key(k)
	j.quote(v)
}

// number appends a number that is not 0, which every reader takes for the default.
func (j *JSONWriter) number(k string, v int64) {
	if v != 0 {
		j.key(k)
		j.buf = strconv.AppendInt(j.buf, v, 10)
	}
}

func (j *JSONWriter) digest(k string, d Digest) {
	j.key(k)
	j.buf = append(j.buf, `"sha256:`...)
	j.buf = hex.AppendEncode(j.buf, d[:])
	j.buf = append(j.buf, '"')
}

func (j *JSONWriter) base64(k, v string) {
	j.key(k)
	j.quote64(v)
}

func (j *JSONWriter) quote64(v string) {
	j.buf = append(j.buf, '"')
	j.buf = base64.StdEncoding.AppendEncode(j.buf, []byte(v))
	j.buf = append(j.buf, '"')
}

func (j *JSONWriter) xattrs(xs []Xattr) {
	for _, raw := range []bool{false, true} {
		open := false
		for _, x := range xs {
			if !utf8.ValidString(x.Name) != raw {
				continue
			}
			switch {
			case open:
				j.buf = append(j.buf, ',')
			case raw:
				j.key("xattrsBytes")
				j.buf = append(j.buf, '{')
			default:
				j.key("xattrs")
				j.buf = append(j.buf, '{')
			}
			open = true
			if raw {
				j.quote64(x.Name)
			} else {
				j.quote(x.Name)
			}
			j.buf = append(j.buf, ':')
			j.quote64(x.Value)
		}
		if open {
			j.buf = append(j.buf, '}')
		}
	}
}

func (j *JSONWriter) flush() {
	if j.err == nil {
		_, j.err = j.w.Write(j.buf)
	}
	j.buf = j.buf[:0]
}
