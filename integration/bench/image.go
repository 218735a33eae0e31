package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

var discard = log.New(io.Discard, "", 0)

// An image is an OCI layout with an ordinary image, whose job writes a line that begins with Ready when it has loaded what it needs,
// and a last one that begins with DONE.
type image struct {
	Name, Dir, Ready string
	Built            bool // by the program debian
}

func parseImage(s, cache string) (image, error) {
	f := strings.Split(s, "=")
	if len(f) == 1 {
		return image{Name: s, Dir: filepath.Join(cache, "images", s), Ready: "READY", Built: true}, nil
	}
	im := image{Name: f[0], Ready: "READY"}
	if len(f) == 3 {
		im.Ready = f[2]
	}
	var err error
	im.Dir, err = filepath.Abs(f[1])
	if len(f) > 3 || im.Name == "" || im.Ready == "" || strings.ContainsFunc(im.Name, func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') }) {
		return im, fmt.Errorf("image %q: want NAME (small letters and digits) or NAME=DIR[=READY]", s)
	}
	return im, err
}

// build makes the layout if it is not there.
func (im image) build(ctx context.Context) error {
	_, err := os.Stat(filepath.Join(im.Dir, "index.json"))
	if err == nil || !im.Built {
		return err
	}
	root, err := module()
	if err != nil {
		return err
	}
	say("building image %s, which takes minutes", im.Name)
	return run(ctx, "go", "-C", root, "run", "./integration/debian", "-dir", filepath.Dir(im.Dir), im.Name)
}

// openLayout returns a layout's first image.
func openLayout(dir string) (v1.Image, error) {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, err
	}
	for {
		m, err := index.IndexManifest()
		if err != nil {
			return nil, err
		}
		if len(m.Manifests) == 0 {
			return nil, fmt.Errorf("%s: it has no image", dir)
		}
		if d := m.Manifests[0]; !d.MediaType.IsIndex() {
			return index.Image(d.Digest)
		} else if index, err = index.ImageIndex(d.Digest); err != nil {
			return nil, err
		}
	}
}

// A form is what an image is made into before it is pushed.
type form struct {
	name string
	// program converts: what it makes is made again when it has changed. "" is none.
	program func(*world) string
	convert func(ctx context.Context, w *world, im image, dst string) error
	wrong   *wrongPack // that the image, as Lazuli converts it, has beside it in the registry
}

var (
	ordinary = &form{name: "ordinary"}
	lazy     = &form{name: "lazuli", program: func(w *world) string { return w.Lazuli }, convert: func(ctx context.Context, w *world, im image, dst string) error {
		return run(ctx, w.Lazuli, "--root", filepath.Join(w.Work, "convert"), "convert", "--quiet", "oci:"+im.Dir, "oci:"+dst)
	}}
	plain   = &form{name: "plain"}                                                                               // lazy, and nothing beside it in the registry
	packed  = &form{name: "lazuli-pack"}                                                                         // lazy, and with a pack in the registry
	rebuilt = &form{name: "rebuilt", program: func(*world) string { return "/proc/self/exe" }, convert: rebuild} // made lazy, it lies beside packed
	stargz  = &form{name: "stargz", program: func(w *world) string { return w.Peers }, convert: func(ctx context.Context, w *world, im image, dst string) error {
		return run(ctx, w.Peers, "stargz-convert", im.Dir, dst)
	}}
	stargzOptimized = &form{name: "stargz-opt", program: stargz.program, convert: func(ctx context.Context, w *world, im image, dst string) error {
		list, err := record(ctx, w, im)
		if err != nil {
			return fmt.Errorf("what the job opens: %w", err)
		}
		// Beside the image, for whoever wants to know.
		if err := os.WriteFile(dst+".opened", []byte(strings.Join(list, "\n")+"\n"), 0o644); err != nil {
			return err
		}
		return run(ctx, w.Peers, "stargz-convert", "-prioritized", dst+".opened", im.Dir, dst)
	}}
)

// prepare has the image in the registry in a form, and returns its reference.
func (w *world) prepare(ctx context.Context, im image, f *form) (string, error) {
	ref := registryHost + "/" + f.name + "/" + im.Name + ":latest"
	if f == rebuilt {
		ref = registryHost + "/" + packed.name + "/" + im.Name + ":rebuilt"
	}
	if w.prepared[ref] {
		return ref, nil
	}
	if f == rebuilt || f.wrong != nil {
		if _, err := w.prepare(ctx, im, packed); err != nil {
			return "", err
		}
	}
	dir, err := w.converted(ctx, im, f)
	if err != nil {
		return "", err
	}
	pushed, err := openLayout(dir)
	if err != nil {
		return "", err
	}
	to, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		return "", err
	}
	if f.wrong != nil { // its blobs are in the registry already: they are mounted
		if pushed, err = remote.Image(to.Context().Registry.Repo(packed.name, im.Name).Tag("latest"), w.past(ctx)...); err != nil {
			return "", err
		}
	}
	if err := remote.Write(to, pushed, w.past(ctx)...); err != nil {
		return "", err
	}
	w.prepared[ref] = true
	switch {
	case f == lazy: // what a conversion into a registry puts beside the image
		err = run(ctx, w.Lazuli, "--root", filepath.Join(w.Work, "convert"), "convert", "--quiet", ref, ref)
	case f == packed:
		err = w.profile(ctx, im, to, pushed, dir)
	case f.wrong != nil:
		err = w.pushWrong(ctx, im, to, f.wrong)
	}
	return ref, err
}

// past returns what it takes to reach the registry past the link.
func (w *world) past(ctx context.Context) []remote.Option {
	return []remote.Option{remote.WithContext(ctx), remote.WithTransport(&http.Transport{DialContext: w.registry.dial})}
}

// converted returns the layout of the image in a form. What is made stays in the cache, until the image or the program that converts it is another.
func (w *world) converted(ctx context.Context, im image, f *form) (dir string, err error) {
	switch {
	case f == packed || f == plain || f.wrong != nil:
		f = lazy
	case f == rebuilt:
		if im.Dir, err = w.made(ctx, im, f); err != nil {
			return "", err
		}
		im.Name, f = im.Name+"-"+f.name, lazy
	}
	return w.made(ctx, im, f)
}

// made returns what a form's function makes of an image.
func (w *world) made(ctx context.Context, im image, f *form) (dir string, err error) {
	if f.convert == nil {
		return im.Dir, nil
	}
	dir = filepath.Join(w.Cache, "bench", im.Name+"-"+f.name)
	key := sha256.New()
	for _, file := range []string{filepath.Join(im.Dir, "index.json"), f.program(w)} {
		r, err := os.Open(file)
		if err != nil {
			return "", err
		}
		_, err = io.Copy(key, r)
		if err := errors.Join(err, r.Close()); err != nil {
			return "", err
		}
	}
	madeOf := fmt.Sprintf("%x", key.Sum(nil))
	return dir, locked(dir+".lock", func() error {
		if have, _ := os.ReadFile(dir + ".made-of"); string(have) == madeOf {
			return nil
		}
		say("converting %s for %s", im.Name, f.name)
		if err := errors.Join(os.RemoveAll(dir), os.RemoveAll(dir+".made-of")); err != nil {
			return err
		}
		if err := f.convert(ctx, w, im, dir); err != nil {
			return err
		}
		return os.WriteFile(dir+".made-of", []byte(madeOf), 0o644)
	})
}
