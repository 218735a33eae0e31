package integration

import (
	"slices"
	"strings"
	"testing"

	"lazuli/integration/worst"
)

// A lazyMount mounts the image at ref, a reference to a registry without TLS, and returns where. It is
// unmounted when the test ends.
type lazyMount func(t testing.TB, ref string) (dir string)

// fidelity shows that mount makes the same tree of the image in layout as
// containerd does, and, for the worst image, as umoci does. img is nil for an ordinary image.
func fidelity(t *testing.T, layout string, img *worst.Image, mount lazyMount) {
	t.Helper()
	needRoot(t)
	if img == nil {
		img = &worst.Image{Unknown: []string{""}}
	}
	ref := NewRegistry(t, RegistryOptions{}).Push(t, layout, "fidelity")
	got, err := Snapshot(mount(t, ref))
	must(t, err)
	report(t, "containerd", Compare(containerd(t, layout), got), containerdDiffers(img))
	report(t, "umoci", Compare(umoci(t, layout), got), umociDiffers(img))
}

// report fails the test for each difference that is not expected.
func report(t testing.TB, who string, list []Difference, expected func(Difference) bool) {
	t.Helper()
	list = slices.DeleteFunc(slices.Clone(list), expected)
	for i, d := range list {
		if i == 50 {
			t.Errorf("%s: %d more", who, len(list)-i)
			return
		}
		t.Errorf("%s: %.1000s", who, d)
	}
}

// containerdDiffers returns which differences from containerd's tree are containerd's:
//   - it gives files from before 1970 the time 0 (pkg/archive: boundTime),
//   - parents without entries get the time of the unpacking,
//   - overlayfs counts links that a higher layer hides.
//
// umoci differs in none of the last three, so each name's each field is held against one of the two.
func containerdDiffers(img *worst.Image) func(Difference) bool {
	return func(d Difference) bool {
		switch d.Field {
		case "mtime":
			return slices.Contains(img.Unknown, d.Path) || slices.Contains(img.Inherited, d.Path) ||
				d.A == (Time{}).String() && strings.HasPrefix(d.B, "-")
		case "nlink":
			return slices.Contains(img.HiddenLinks, d.Path)
		}
		return false
	}
}

// umociDiffers returns which differences from umoci's tree are umoci's: it sets no xattr with
// an empty value, and removing what comes twice in a tar changes the directory's time.
func umociDiffers(img *worst.Image) func(Difference) bool {
	return func(d Difference) bool {
		switch d.Field {
		case "mtime":
			return slices.Contains(img.Unknown, d.Path) || d.Path == "twice"
		case "xattrs":
			return d.Path == "xattrs/empty"
		}
		return false
	}
}

// worstImage writes the worst image into a directory of the test.
func worstImage(t testing.TB, o worst.Options) (layout string, img *worst.Image) {
	t.Helper()
	layout = t.TempDir()
	img, err := worst.Write(layout, o)
	must(t, err)
	return layout, img
}

// TestUnpackers shows that the two references agree on the worst image, where they are not known to differ, and
// that what they are known to differ in is there: else the image would not hold what it should.
func TestUnpackers(t *testing.T) {
	needRoot(t)
	layout, img := worstImage(t, worst.Options{})
	a, b := containerd(t, layout), umoci(t, layout)
	both := Compare(a, b)
	report(t, "containerd and umoci", both, func(d Difference) bool {
		return containerdDiffers(img)(d) || umociDiffers(img)(d)
	})
	old, empty := 0, 0
	for _, d := range both {
		if d.Field == "mtime" && strings.HasPrefix(d.B, "-") {
			old++
		}
		if d.Field == "xattrs" {
			empty++
		}
	}
	if old != 31 || empty != 1 || len(a) < 600 {
		t.Errorf("%d names, %d of them from before 1970, %d with an empty xattr; want over 600, 31, 1", len(a), old, empty)
	}
	for _, name := range img.HiddenLinks {
		if a[name].Nlink != 2 || b[name].Nlink != 1 {
			t.Errorf("%s: containerd counts %d links, umoci %d; want 2, 1", name, a[name].Nlink, b[name].Nlink)
		}
	}
	// What must be gone, and what must be there.
	for _, name := range []string{"white/file", "white/dir/old", "white/removed, added, removed", "opaque/entry/old", "change/dir-file-dir/old", "change/dir-link/old"} {
		if n, ok := a[name]; ok {
			t.Errorf("%s is there: %+v", name, n)
		}
	}
	for _, name := range []string{"white/removed, added", "white/dir", "opaque/entry/new", "opaque/entry/newer", "change/implied/old", "change/implied/new"} {
		if _, ok := a[name]; !ok {
			t.Errorf("%s is not there", name)
		}
	}
}

// TestUnpackLowerLinks shows what a hard link to a lower layer's file is, which containerd cannot unpack.
func TestUnpackLowerLinks(t *testing.T) {
	needRoot(t)
	layout, _ := worstImage(t, worst.Options{LowerLinks: true})
	tree := umoci(t, layout)
	if n := tree["links/to a lower layer"]; n.Nlink != 2 || n.First != "links/to a lower layer" || n.SHA256 != tree["sizes/4097"].SHA256 {
		t.Errorf("%+v, want a second name of %+v", n, tree["sizes/4097"])
	}
}
