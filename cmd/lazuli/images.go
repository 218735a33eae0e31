package main

import (
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"lazuli/fs/rootfs"
)

func newImagesCommand(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "images",
		Short: "List the images that this node keeps",
		Long: `Images lists what was mounted or run here, and what containerd pulled with the snapshotter lazuli, the last used first: the size of each image's files, each content once, and
the share of them that is here. Files that images have in common are here once and count for each.`,
		Example: `  lazuli images
  lazuli images --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withHost(cmd.ErrOrStderr(), func(h host) error {
				images, err := h.Images(cmd.Context())
				if err != nil {
					return err
				}
				if asJSON {
					if images == nil {
						images = []rootfs.Image{}
					}
					return writeJSON(cmd.OutOrStdout(), images)
				}
				w := tabwriter.NewWriter(printable(cmd.OutOrStdout()), 0, 0, 2, ' ', 0)
				fmt.Fprintln(w, "IMAGE\tDIGEST\tFILES\tHERE\tUSED\tBY\t")
				for _, im := range images {
					share, used := 100.0, im.Used.Local().Format(time.DateTime)
					if im.Bytes > 0 {
						share = 100 * float64(im.BytesHere) / float64(im.Bytes)
					}
					if im.InUse {
						used = "now"
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s (%.0f %%)\t%s\t%s\t\n", im.Reference, shortDigest(im.Digest), size(im.Bytes), size(im.BytesHere), share, used, holder(im))
				}
				return w.Flush()
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newRmiCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "rmi IMAGE…",
		Short: "Let go of images",
		Long: `Rmi forgets images and removes what only they needed from the disk. IMAGE is a name as lazuli images prints it, or a digest
or the beginning of one. An image that is mounted stays, and so does one that containerd has: remove it there, with ctr images rm or crictl rmi.`,
		Example: `  lazuli rmi localhost:5000/python:lazy
  lazuli rmi 3f8a21`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withHost(cmd.ErrOrStderr(), func(h host) error {
				var errs []error
				for _, name := range args {
					images, err := h.Images(cmd.Context())
					if err != nil {
						return err
					}
					ref, err := rootfs.Find(images, name)
					if err == nil {
						var freed int64
						if freed, err = h.Remove(cmd.Context(), ref); err == nil {
							fmt.Fprintf(cmd.OutOrStdout(), "%s removed, %s free\n", ref, size(freed))
							continue
						}
					}
					errs = append(errs, err)
				}
				return errors.Join(errs...)
			})
		},
	}
}

func newPruneCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "prune",
		Short:   "Remove from the disk what no image needs",
		Long:    `Prune removes what no image of lazuli images needs: what was fetched for images that are forgotten, and what ended halfway.`,
		Example: "  lazuli prune",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withHost(cmd.ErrOrStderr(), func(h host) error {
				freed, err := h.Prune(cmd.Context())
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s free\n", size(freed))
				return err
			})
		},
	}
}

// holder is who removes an image.
func holder(im rootfs.Image) string {
	if im.Containerd {
		return "containerd"
	}
	return "lazuli"
}
