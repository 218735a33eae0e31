package toc

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// TestOpenTar: a layer says by its first bytes how it is compressed.
func TestOpenTar(t *testing.T) {
	const content = "not really a tar, but long enough to be one to a reader that does not look"
	var gz, zs, skipped bytes.Buffer
	w := gzip.NewWriter(&gz)
	io.WriteString(w, content)
	w.Close()
	z, err := zstd.NewWriter(&zs)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(z, content)
	z.Close()
	skipped.WriteString("\x5a\x2a\x4d\x18\x03\x00\x00\x00abc") // RFC 8878, section 3.1.2
	skipped.Write(zs.Bytes())
	for name, blob := range map[string]string{
		"plain": content, "gzip": gz.String(), "two gzip members": gz.String() + gz.String(),
		"zstd": zs.String(), "zstd behind a skippable frame": skipped.String(), "short": "ab", "empty": "",
	} {
		want := map[string]string{"two gzip members": content + content, "short": "ab", "empty": ""}
		r, err := OpenTar(bytes.NewReader([]byte(blob)))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, err := io.ReadAll(r)
		if w, ok := want[name]; err != nil || ok && string(got) != w || !ok && string(got) != content {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		r.Close()
	}
	broken := errors.New("broken")
	if _, err := OpenTar(io.MultiReader(bytes.NewReader([]byte("a")), brokenReader{broken})); !errors.Is(err, broken) {
		t.Errorf("a reader that fails: %v", err)
	}
	if _, err := OpenTar(bytes.NewReader([]byte("\x1f\x8b not gzip"))); err == nil {
		t.Error("a header that is no gzip header was taken")
	}
}

type brokenReader struct{ err error }

func (r brokenReader) Read([]byte) (int, error) { return 0, r.err }
