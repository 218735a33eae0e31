package convert

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// A layout keeps what else is in it: other images, and fields that no specification has.
func TestLayoutKept(t *testing.T) {
	other := simple(t, []file{reg("other", "o")})
	index := filepath.Join(other.Path(), "index.json")
	raw, err := os.ReadFile(index)
	if err != nil {
		t.Fatal(err)
	}
	raw = bytes.Replace(raw, []byte("{"), []byte(`{"x.made":1,`), 1)
	if err := os.WriteFile(index, raw, 0o644); err != nil {
		t.Fatal(err)
	}
	_, was, _ := open(t, other)
	src := simple(t, []file{reg("a", "a")})
	r := mustConvert(t, src, ref(t, "oci:"+other.Path()+":lazy"), Options{})
	for tag, want := range map[string]v1.Hash{"latest": was.Digest, "lazy": r.Digest} {
		if _, desc, _ := open(t, ref(t, "oci:"+other.Path()+":"+tag)); desc.Digest != want {
			t.Errorf("%s: %v, want %v", tag, desc.Digest, want)
		}
	}
	// The tag moves, and a conversion that fails does not remove what it did not make.
	r = mustConvert(t, other, ref(t, "oci:"+other.Path()+":lazy"), Options{})
	if _, desc, _ := open(t, ref(t, "oci:"+other.Path()+":lazy")); desc.Digest != r.Digest {
		t.Errorf("lazy: %v, want %v", desc.Digest, r.Digest)
	}
	now, err := os.ReadFile(index)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(now, []byte(`"x.made":1`)) {
		t.Errorf("index.json: %s", now)
	}
	if err := os.WriteFile(filepath.Join(src.Path(), "index.json"), now, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := convertTo(t, src, ref(t, "oci:"+other.Path()+":lazy"), Options{}); err == nil {
		t.Error("an image without its blobs was converted")
	}
	if after, _ := os.ReadFile(index); !bytes.Equal(now, after) {
		t.Error("index.json changed")
	}
}

func TestProgress(t *testing.T) {
	src := simple(t, []file{reg("a", noise("a", 100000))}, []file{reg("b", "b")})
	dst := newDst(t)
	for _, again := range []bool{false, true} {
		p := new(Progress)
		r := mustConvert(t, src, dst, Options{Progress: p})
		s := p.Status()
		var in, out int64
		for _, l := range r.Layers {
			in, out = in+l.SourceSize, out+l.TargetSize
		}
		if s.Layers != 2 || s.LayersDone != 2 || s.Total != in || s.In != in || s.Left != 0 {
			t.Errorf("again=%v: %+v", again, s)
		}
		if want := map[bool][2]int64{false: {in, out}, true: {0, 0}}[again]; s.Read != want[0] || s.Out != want[1] {
			t.Errorf("again=%v: read %d, wrote %d, want %v", again, s.Read, s.Out, want)
		}
	}
}
